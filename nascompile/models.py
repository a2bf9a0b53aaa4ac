"""Finding a pretrained model: embedded, a local folder, or a Hugging Face id; its family; and whether its head fits the labels."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nascompile import plugins
from nascompile.errors import ModelError, UnsupportedError
from nascompile.families import Family
from nascompile.records import Target, digest, file_digest

NEAR = 0.8
"""How alike an unknown entry of a configuration and a known one are where the known one was meant; Hugging Face has others of its own."""
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "vocab.txt", "merges.txt", "*.model"]


def locate(source: str) -> Path:
    """The local folder of a model, downloaded if `source` is a hub id; ModelError if there is none or it has no safetensors."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _download(source)
    if not (folder / "config.json").is_file():
        raise ModelError(f"no config.json in {folder}", hint="give a folder saved by `save_pretrained`")
    if not list(folder.glob("*.safetensors")):
        found = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".h5", ".ckpt", ".msgpack"})
        raise ModelError(
            f"no safetensors weights in {folder}", detail=f"found: {', '.join(found) or 'no weights at all'}",
            hint="load the model where you trust it and call `model.save_pretrained(folder)`: it writes safetensors",
        )  # fmt: skip
    return folder


def is_description(source: str) -> bool:
    """Whether it is a local folder that describes a network for microcontrollers, without weights: these are random then."""
    path = Path(source).expanduser() / "config.json"
    if not path.is_file() or any(path.parent.glob("*.safetensors")):
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type") == "mcu_vit"  # type: ignore[no-any-return]
    except json.JSONDecodeError:
        return False  # which `read_config` says


def read_config(folder: Path) -> Any:
    """The Hugging Face configuration; ModelError for an architecture no family handles."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"damaged config.json in {folder}", detail=str(error), hint="download or save the model again") from error
    kind = content.get("model_type", "")
    family = family_of(kind)
    hint = "take a model without that, or change its config.json where the weights allow it"
    if own := getattr(family, "config_class", None):
        hint = "docs/mcu_vit.md has the entries of its config.json"
        if faults := _misread(own, content):
            raise ModelError(f"config.json in {folder} cannot be meant so", detail="\n".join(faults), hint=hint)
        config: Any = own.from_pretrained(folder)
    elif kind == "nascompile-toy":
        from nascompile.families.toy import ToyConfig

        config = ToyConfig.from_pretrained(folder)
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if reason := family.unsupported(config):
        raise ModelError(f"the {family.name} family cannot take {folder}: {reason}", hint=hint)
    return config


def _misread(own: Any, content: Mapping[str, Any]) -> list[str]:
    """What a configuration class of ours would take without a word: misspelled entries, and values of another kind than the defaults."""
    wanted = {name: p.default for name, p in inspect.signature(own.__init__).parameters.items() if p.default is not p.empty}
    kinds = {int: "a whole number", float: "a number", tuple: "a list of whole numbers"}
    faults = []
    for name, value in content.items():
        if name in wanted:
            kind = type(wanted[name])
            items = value if isinstance(value, list) else [value]
            whole = all(isinstance(item, int) and not isinstance(item, bool) for item in items)
            fits = isinstance(value, int | float) if kind is float else whole and isinstance(value, list) == (kind is tuple)
            if not fits:
                faults.append(f"{name} = {json.dumps(value)}: {kinds[kind]} is needed")
        elif near := difflib.get_close_matches(name, wanted, 1, NEAR):
            faults.append(f"unknown entry {name}: did you mean {near[0]}?")
    return faults


def family_of(model_type: str) -> Family:
    """The family that handles a `model_type`; ModelError listing the known ones."""
    known = {}
    for name in plugins.names("families"):
        family: Family = plugins.get("families", name)
        if model_type in family.model_types:
            return family
        known[name] = family.model_types
    raise ModelError(
        f"unknown architecture: {model_type or 'no model_type in config.json'}",
        hint="known: " + "; ".join(f"{name} ({', '.join(types)})" for name, types in known.items()),
    )


def check_lowering(family: Family, target: Target) -> None:
    """UnsupportedError where the networks of a family have no form that the target's backend takes."""
    backend = plugins.get("backends", target.backend)
    if backend.accepts not in (forms := getattr(family, "accepts", (backend.accepts,))):
        takers = [name for name in plugins.names("backends") if plugins.get("backends", name).accepts in forms]
        raise UnsupportedError(
            f"`{target.backend}` builds no networks of the family {family.name}: they are for {', '.join(takers)}",
            hint="a device of these, such as --device stm32f746",
        )


def has_head(folder: Path) -> bool:
    """Whether the stored weights hold a classification head."""
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            if any(name.split(".")[0] == "classifier" for name in weights.keys()):  # noqa: SIM118 (not a mapping)
                return True
    return False


def head_labels(config: Any) -> tuple[str, ...]:
    """The head's label names in order."""
    return tuple(config.id2label[i] for i in sorted(config.id2label))


def weights_digest(folder: Path) -> str:
    """Digest of every safetensors file of a folder."""
    return digest([(path.name, file_digest(path)) for path in sorted(folder.glob("*.safetensors"))])


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"cannot find the model: {source}", detail=f"no such folder here, and the hub said: {str(error).splitlines()[0]}",
            hint="give a local folder saved by `save_pretrained`, or check the id and the network (HF_ENDPOINT names another hub)",
        ) from error  # fmt: skip
