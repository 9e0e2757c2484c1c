"""Models to and from the Hugging Face hub, as its conventions have it. Without a network, or without a token, one sentence."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from emformer.interop import own
from emformer.parts import UserError
from emformer.text.hub import reachable

SMALL = ("*.json", "*.txt", "*.safetensors")  # of these a model is made; pickles only where there is nothing else
PICKLES = ("*.bin",)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


@runtime_checkable
class Saves(Protocol):
    """What `emformer.load` gives."""

    def save(self, folder: str | Path) -> Path:
        """Write a folder of ours."""
        ...


def is_name(text: str) -> bool:
    """Whether this may be the name of a model on the hub: "gpt2", "owner/name"."""
    return bool(_NAME.fullmatch(text)) and not text.endswith((".ckpt", ".pt", ".bin", ".safetensors", ".json", ".yaml", ".git"))


def pull(name: str, *, download: Callable[..., Any] = snapshot_download) -> Path:
    """The folder of a model of the hub, in the local cache: `emformer.load` reads it.

    Only configuration, tokenizer and weights are fetched, pickled weights only where there are no others. Without a network
    what the cache has is taken; if it has nothing, that is said within three seconds.

    Args:
        name: "gpt2", "owner/name".
        download: what fetches it, as `huggingface_hub.snapshot_download`.

    Raises:
        UserError: if there is no such model, it is closed to us, or the hub cannot be reached.
    """
    if not is_name(name):
        raise UserError(f"'{name}' is no name of a model on the hub: they are written name or owner/name.")
    online = reachable()

    def fetch(patterns: tuple[str, ...]) -> Path:
        # ignored: what other libraries keep in folders of their own
        return Path(download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"], local_files_only=not online))

    try:
        folder = fetch(SMALL)
        return folder if any(folder.glob("*.safetensors")) else fetch(SMALL + PICKLES)
    except GatedRepoError as error:
        raise UserError(f"the model '{name}' is gated: ask for access on its page, then log in with `hf auth login`.") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(f"there is no model '{name}' on the hub that you may read: correct the name, or log in.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200] if online else "the hub cannot be reached, and it is not in the cache"
        raise UserError(f"cannot fetch the model '{name}' ({why}): name a local folder, or try again with a network.") from error


def push(source: Saves | str | Path, name: str, *, private: bool | None = None, api: HfApi | None = None) -> str:
    """Put a model on the hub, with a model card, and return the address of what was committed.

    Args:
        source: what `emformer.load` gives, written as a folder of ours; or a folder of a model, which goes up as it is.
        name: "owner/name", or a name alone for an account of one's own. A repository that is not there is created.
        private: null as the account has it.
        api: the hub, with the token to use; null for the one that one is logged in at.

    Raises:
        UserError: without network or token, or if the hub refuses.
    """
    if not is_name(name):
        raise UserError(f"'{name}' cannot be the name of a model on the hub: write name or owner/name.")
    if api is None:
        if not reachable():
            raise UserError(f"cannot push to '{name}': the hub cannot be reached; what was written on this machine is whole.")
        if get_token() is None:
            raise UserError(f"cannot push to '{name}' without a token: log in with `hf auth login`, or set HF_TOKEN.")
        api = HfApi(library_name="emformer")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(source) if isinstance(source, str | Path) else source.save(Path(place) / "model")
        text = card(folder, name)
        try:
            repo = str(api.create_repo(name, private=private, exist_ok=True).repo_id)  # with the owner
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Model and tokenizer", ignore_patterns=[".*"]
            )
            if not (folder / own.CARD).exists():
                done = api.upload_file(
                    repo_id=repo, path_or_fileobj=text.encode(), path_in_repo=own.CARD, commit_message="Model card"
                )
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"the hub did not take '{name}' ({why}).") from error
    return str(getattr(done, "commit_url", done))


def card(folder: Path, name: str) -> str:
    """The model card of a folder: front matter for the hub, what the model is, how to load it.

    Raises `UserError` for a folder without a config.json of a model.
    """
    try:
        config = json.loads((folder / own.CONFIG).read_text(encoding="utf-8"))
        family = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no config.json of a model; emformer convert makes a folder that has one.") from error
    ours = family == "emformer"
    model = config.get("model", {}) if ours else {}
    head = ["---", f"library_name: {'emformer' if ours else 'transformers'}", "tags:", "- emformer", "---", "", f"# {name}", ""]
    what = "A transformer of two operators per head, a bilinear form M and a linear content operator F"
    if ours:
        facts = ", ".join(f"{key} {model[key]}" for key in ("dim", "depth", "heads", "context") if key in model)
        kinds = "; ".join(
            f"{key}: {_short(model[key])}" for key in ("form", "content", "kernel", "norm", "ffn") if model.get(key)
        )
        body = [f"{what} ({facts}; vocabulary {config.get('vocab')}).", "", kinds + ".", "", "```python"]
        body += ["import emformer as emf", "", f'run = emf.load("{name}")', "print(run.model, run.tokenizer)", "```"]
    else:
        body = [f"{what}, exported to the architecture `{family}`.", "", "```python"]
        body += ["from transformers import AutoModelForCausalLM", "", f'AutoModelForCausalLM.from_pretrained("{name}")', "```"]
    return "\n".join([*head, *body, ""])


def _short(part: Any) -> str:
    """A part as its class and arguments."""
    if not isinstance(part, dict):
        return str(part)
    arguments = ", ".join(f"{key}={value}" for key, value in part.get("init_args", {}).items())
    return f"{str(part.get('class_path')).rpartition('.')[2]}({arguments})"
