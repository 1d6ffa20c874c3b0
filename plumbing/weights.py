"""Files of weights of others."""
import re
from pathlib import Path


from plumbing import files



def from_hub(name):
    """A model's name on the Hugging Face hub -> the folder of its files, downloaded once; a folder is itself.

    The hub, and its folder here, name a file of weights by its SHA-256: one that is torn or was changed is removed."""
    if Path(name).is_dir():
        return str(name)
    try:
        from huggingface_hub import snapshot_download        # comes with transformers
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except ImportError:
        raise ValueError(f"{name} is no folder, and to download it huggingface_hub is missing: pip install transformers") from None
    except Exception as error:                                # no connection, no such model, no permission: each raises its own
        raise ValueError(f"{name} cannot be loaded: no folder, and not to be had from the Hugging Face hub ({' '.join(str(error).split())[:120]}): "
                         "give a model's name, with a connection, or the folder of a downloaded one") from None
    for path in folder.iterdir():
        blob = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and files.sha256(blob) != blob.name:
            blob.unlink(), path.unlink(missing_ok=True)
            raise ValueError(f"{path}: its SHA-256 is not {blob.name[:16]}..., the hub's: removed, run the same command again to download it")
    return str(folder)
