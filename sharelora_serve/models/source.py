"""Where a base's files are: in a folder, in the embedded package, or on the Hugging Face hub."""

from pathlib import Path

from rich.console import Console

from sharelora_serve.errors import ConfigurationError
from sharelora_serve.models.embedded import embedded_base_folder

_WANTED_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja")
_UNWANTED_FILES = (
    "*/*",  # the same weights for other programs
    "consolidated*",  # Mistral's second copy of the weights
)


def base_folder(
    model: str | None, console: Console | None = None, *, config_only: bool = False
) -> Path:
    """The Hugging Face folder of a base: the embedded one for None, else a folder or a hub id.

    What a hub id names is downloaded into Hugging Face's own cache, unless it is there: weights as
    safetensors, configuration and tokenizer, or config.json alone if config_only. Messages while
    the embedded base is unpacked go to the console, by default that of standard error.

    Raises ConfigurationError if there is no such model or its files cannot be had.
    """
    if model is None:
        return embedded_base_folder(console)
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"model {model!r}: the folder has no config.json; give the folder that holds "
                "config.json and *.safetensors"
            )
        return folder
    return _from_hub(model, ("config.json",) if config_only else _WANTED_FILES)


def _from_hub(model: str, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and folders do without
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        snapshot = snapshot_download(
            model, allow_patterns=list(wanted), ignore_patterns=list(_UNWANTED_FILES)
        )
    except HFValidationError:
        problem = "is neither a folder nor a hub id such as meta-llama/Llama-3.2-1B-Instruct"
    except GatedRepoError:
        problem = (
            "needs its owner's consent: ask for it on the model's page at huggingface.co, then "
            "set HF_TOKEN to your token"
        )
    except RepositoryNotFoundError:
        problem = (
            "is neither a folder nor a model on the hub; correct it, or set HF_TOKEN to your "
            "token if the model is private"
        )
    except LocalEntryNotFoundError:
        problem = (
            "is no folder, it has not been downloaded before, and the hub cannot be reached; "
            "connect to it, or give a folder"
        )
    except Exception as error:  # the disk's, the hub's or those of its client's network library
        problem = f"could not be downloaded from the hub ({error}); try again, or give a folder"
    else:
        folder = Path(snapshot)
        if (folder / "config.json").is_file():
            return folder
        problem = "has no config.json on the hub; give a model in Hugging Face's own format"
    raise ConfigurationError(f"model {model!r}: {problem}")
