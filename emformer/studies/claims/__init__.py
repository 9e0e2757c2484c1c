"""Claims about trained models, one study a file: what `emformer study` knows by name."""
