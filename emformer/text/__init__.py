"""Text: corpora, tokenizers, a grammar of known entropy, and blocks of tokens. Nothing here imports torch."""

from emformer.text.blocks import Blocks, Windows, prepare
from emformer.text.corpora import Absent, File, Hub, PythonDocs
from emformer.text.grammar import KINDS, TOPICS, EntropyRate, Grammar, Labelled, Language, token_labels
from emformer.text.probe import Prompts, probe, shuffled, token_classes
from emformer.text.tokenizers import BPE, Bytes, Characters, Pretrained, fingerprint, load, save, vocabulary

__all__ = [
    "BPE",
    "KINDS",
    "TOPICS",
    "Absent",
    "Blocks",
    "Bytes",
    "Characters",
    "EntropyRate",
    "File",
    "Grammar",
    "Hub",
    "Labelled",
    "Language",
    "Pretrained",
    "Prompts",
    "PythonDocs",
    "Windows",
    "fingerprint",
    "load",
    "prepare",
    "probe",
    "save",
    "shuffled",
    "token_classes",
    "token_labels",
    "vocabulary",
]
