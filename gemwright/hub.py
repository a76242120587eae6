"""A model's name or its folder -> a folder here: `google/gemma-2-2b-it` is fetched from Hugging Face once.

huggingface_hub does the fetching, into the cache that it shares with transformers (`HF_HOME`,
`HF_HUB_CACHE`), with its own progress bars on stderr. A connection that breaks is taken up near where it
broke; of a fetch that was given up, whole files stay and are not asked for again. `HF_ENDPOINT` names another
hub, `HF_HUB_OFFLINE=1` forbids any request, `HF_TOKEN` (or `hf auth login`) says who asks for gated weights.
"""

import re
from pathlib import Path

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# What a checkpoint consists of for us; a repository also holds the same weights in other formats.
_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.model",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "card.json",
)  # fmt: skip


def fetch(name_or_folder: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: the one that is named, or where a model of that name lies after fetching.

    What is cached already is compared with the hub and taken as it is if the hub cannot be reached.

    Args:
        name_or_folder: a folder, or `owner/name` where no such folder exists. What begins with `.`, `/` or
            `~` or has another number of slashes is a folder and never asked for. (As a `Path`, `./a/b` has
            lost its dot: hand on what the user typed.)
        revision: a branch, tag or commit; the main branch if None. Only for a name.
    Raises:
        FileNotFoundError: neither a folder here nor a model there; or there is no such revision.
        NotADirectoryError: it is a file.
        ValueError: a revision is asked of a folder.
        PermissionError: the model is gated and its licence not accepted by who asks, or the token is wrong.
        ConnectionError: the hub cannot be reached and the cache does not hold the whole model, or the
            fetch broke off.
    """
    text, folder = str(name_or_folder), Path(name_or_folder)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{text} is a folder, which has no revisions: leave revision={revision!r} out.")
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{text} is a file. Name the folder that holds the checkpoint.")
    if text.startswith(".") or not _NAME.fullmatch(text):
        raise FileNotFoundError(
            f"there is no folder {text}. Name one that holds a checkpoint (config.json, ...), or a model on "
            "Hugging Face as owner/name."
        )
    return _download(text, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    hub = constants.ENDPOINT
    try:
        # A subfolder holds other formats, or another model.
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(_FILES), ignore_patterns=["*/*"]
        )
    except errors.GatedRepoError:
        raise PermissionError(
            f"{name} is gated: its owner wants its licence accepted first. Accept it at {hub}/{name}, then "
            "show who you are by `hf auth login` or HF_TOKEN, and run the same command again."
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{name} has no revision {revision!r}. Leave it out for the main branch, or look at {hub}/{name}."
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FileNotFoundError(
            f"{name} is neither a folder here nor a model at {hub}, as far as you may see. Correct the name; "
            "a private model wants `hf auth login` or HF_TOKEN."
        ) from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            why, remedy = "HF_HUB_OFFLINE forbids fetching it", "Unset HF_HUB_OFFLINE"
        else:
            why, remedy = f"{hub} cannot be reached ({_first_line(error.__cause__)})", "Go online"
        raise ConnectionError(
            f"{name} is no folder here, the cache does not hold the whole of such a model, and {why}. "
            f"{remedy} and run the same command again, or name a folder."
        ) from None
    except Exception as error:  # its own, the HTTP library's and Xet's have no common base
        if isinstance(error, OSError) and error.errno:
            raise  # the system's: a full disk, a cache that may not be written
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise PermissionError(
                f"{hub} refuses {name} ({_first_line(error)}). Check HF_TOKEN, or log in again with "
                "`hf auth login`."
            ) from None
        raise ConnectionError(
            f"fetching {name} from {hub} broke off ({_first_line(error)}). Run the same command again: files "
            "that are whole stay."
        ) from error
    return Path(found)


def _first_line(error: BaseException | None) -> str:
    said = str(error).strip().splitlines() if error else []
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
