"""Raw samples ▸ the network's inputs: one code for training, engines and prediction, with neither torch nor transformers.

A preprocessor is its settings (`preprocessing.json`) and the files it came with (`tokenizer.json`, and the Hugging Face files that
let a pipeline open the folder). Encoding has two halves so that a split can be stored small: `encode` gives what is stored
(token ids int32, pixels uint8, resized), `finish` what the network reads (int64, normalised float32).
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from nascompile import records
from nascompile.errors import DataError, ModelError
from nascompile.records import Record

Arrays = dict[str, npt.NDArray[Any]]

SETTINGS_FILE = "preprocessing.json"
TOKENIZER_FILE = "tokenizer.json"
COPIED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")
"""Not read by an engine: kept so that Hugging Face pipelines open its folder."""
LENGTH_MULTIPLE = 8
LENGTH_PERCENTILE = 95
OFFSET_POSITIONS = ("camembert", "roberta", "xlm-roberta")
"""Model types that count positions from the padding id + 1, and so have that many fewer."""


class Preprocessing(Record, frozen=True):
    """What is done to a raw sample; the fields of the other modalities keep their defaults."""

    modality: Literal["text", "image", "vector"]
    inputs: tuple[str, ...]
    """Names of the network's inputs, in order."""
    max_length: int = 0
    """Tokens per text; 0 until it has been chosen."""
    length_limit: int = 0
    """Most tokens the network has positions for."""
    pad_token_id: int = 0
    padding_side: Literal["left", "right"] = "right"
    channels: int = 3
    resize: tuple[int, int] = (0, 0)
    """Height and width; (n, 0) means n for the shorter edge and the aspect ratio kept; (0, 0) means not resized."""
    crop: tuple[int, int] = (0, 0)
    """Height and width cut from the centre; (0, 0) means not cropped."""
    resample: int = 2
    """Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic."""
    rescale: float = 1 / 255
    mean: tuple[float, ...] = ()
    """One value per channel."""
    std: tuple[float, ...] = ()
    features: int = 0
    """Length of a vector."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the network sees."""
        return self.crop if self.crop != (0, 0) else self.resize


@dataclass(frozen=True, eq=False)
class Preprocessor:
    settings: Preprocessing
    assets: Mapping[str, bytes]
    """Files beside `preprocessing.json`, by name."""

    # ---------------------------------------------------------------------------------------- from and to files

    @classmethod
    def from_model_folder(
        cls, folder: str | Path, config: Mapping[str, Any], max_length: int = 0, inputs: Sequence[str] | None = None
    ) -> Preprocessor:
        """The preprocessor of a local Hugging Face model folder. `config`: its configuration; `inputs`: the family's input names
        (guessed from the configuration if None). ModelError if the folder lacks what the modality needs."""
        folder = Path(folder)
        names = tuple(inputs) if inputs is not None else _input_names(config)
        assets = {name: (folder / name).read_bytes() for name in COPIED_FILES if (folder / name).is_file()}
        if "input_ids" in names:
            assets[TOKENIZER_FILE] = _tokenizer_json(folder)
            return cls(_text_settings(names, assets, config, folder), assets).with_max_length(max_length)
        if "pixel_values" in names:
            settings = _image_settings(names, assets, config, folder)
            assets.setdefault("preprocessor_config.json", _preprocessor_config(settings))
            return cls(settings, assets)
        return cls(Preprocessing(modality="vector", inputs=names, features=int(config.get("features", 0))), assets)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Preprocessor:
        """The preprocessor stored in an engine folder, or in the `data` of a run folder; RecordError if there is none."""
        folder = Path(folder)
        nested = folder / "data" / "preprocessor"
        folder = nested if (nested / SETTINGS_FILE).exists() else folder
        settings = records.load(folder / SETTINGS_FILE, Preprocessing)
        names = (TOKENIZER_FILE, *COPIED_FILES)
        assets = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
        if settings.modality == "text" and TOKENIZER_FILE not in assets:
            raise ModelError(f"no {TOKENIZER_FILE} beside {SETTINGS_FILE}: {folder}", hint="copy the whole folder, or build it again")
        return cls(settings, assets)

    def files(self) -> dict[str, bytes]:
        """Name ▸ content of every file that `from_folder` and Hugging Face pipelines need."""
        body = {"record": "Preprocessing", "version": Preprocessing.version, "data": self.settings}
        return {**self.assets, SETTINGS_FILE: msgspec.json.format(records.encode(body), indent=1)}

    # ---------------------------------------------------------------------------------------- maximum length

    def with_max_length(self, max_length: int) -> Preprocessor:
        """The same, truncating and padding to `max_length` tokens (0: not yet chosen); ModelError beyond the network's positions."""
        limit = self.settings.length_limit
        if max_length < 0 or (limit and max_length > limit):
            raise ModelError(f"the model takes at most {limit} tokens: {max_length}", hint=f"set --max-length to {limit} or less")
        return replace(self, settings=msgspec.structs.replace(self.settings, max_length=max_length))

    def fitted(self, texts: Sequence[Any]) -> Preprocessor:
        """The same, with the maximum length of `choose_max_length`; unchanged if it is set already or this is no text."""
        if self.settings.modality != "text" or self.settings.max_length:
            return self
        canonical = [self.canonical(text) for text in texts]
        return self.with_max_length(choose_max_length(self.tokenizer, canonical, self.settings.length_limit))

    @cached_property
    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer` that truncates at the maximum length and never pads."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.assets[TOKENIZER_FILE].decode("utf-8"))
        tokenizer.no_padding()
        if self.settings.max_length:
            tokenizer.enable_truncation(self.settings.max_length)
        else:
            tokenizer.no_truncation()
        return tokenizer

    # ---------------------------------------------------------------------------------------- one sample

    def canonical(self, raw: Any) -> Any:
        """The sample itself, free of how it was stored: trimmed text or a pair of them, an image of the right channels, a float32
        vector. DataError if it is none of these."""
        if self.settings.modality == "text":
            return _text(raw)
        if self.settings.modality == "image":
            return _image(raw, self.settings.channels)
        return _vector(raw, self.settings.features)

    def content_digest(self, canonical: Any) -> bytes:
        """SHA-256 (32 bytes) of a canonical sample: equal exactly if the contents are."""
        if self.settings.modality == "text":
            parts = (canonical,) if isinstance(canonical, str) else canonical
            return hashlib.sha256(records.encode(parts)).digest()
        if self.settings.modality == "image":
            return hashlib.sha256(f"{canonical.mode} {canonical.size} ".encode() + canonical.tobytes()).digest()
        return hashlib.sha256(canonical.tobytes()).digest()

    # ---------------------------------------------------------------------------------------- batches

    def encode(self, samples: Sequence[Any], pad: Literal["max_length", "longest"] = "max_length") -> Arrays:
        """What is stored, (n, …): token ids int32 and masks uint8 of equal length, pixels uint8 (n, C, H, W), vectors float32."""
        canonical = [self.canonical(sample) for sample in samples]
        if self.settings.modality == "text":
            return self._encode_texts(canonical, pad)
        name = self.settings.inputs[0]
        if self.settings.modality == "image":
            height, width = self.settings.image_size
            empty = np.zeros((0, self.settings.channels, height, width), np.uint8)
            return {name: np.stack([_pixels(image, self.settings) for image in canonical]) if canonical else empty}
        return {name: np.stack(canonical) if canonical else np.zeros((0, self.settings.features), np.float32)}

    def finish(self, stored: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """What the network reads: int64 ids and masks, pixels rescaled and normalised to float32."""
        if self.settings.modality == "text":
            return {name: stored[name].astype(np.int64) for name in self.settings.inputs}
        if self.settings.modality == "vector":
            return {name: np.asarray(stored[name], np.float32) for name in self.settings.inputs}
        scale, shift = self.scaling()
        return {name: stored[name].astype(np.float32) * scale + shift for name in self.settings.inputs}

    def scaling(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Factor and summand (channels, 1, 1) of a pixel's byte."""
        mean, std = (np.asarray(values, np.float64).reshape(-1, 1, 1) for values in (self.settings.mean, self.settings.std))
        # One product and one sum per pixel: (x · rescale - mean) / std, its two constants rounded to float32 once.
        return (self.settings.rescale / std).astype(np.float32), (-mean / std).astype(np.float32)

    def __call__(self, samples: Sequence[Any], pad: Literal["max_length", "longest"] = "max_length") -> Arrays:
        """The network's inputs (n, …) for raw samples; DataError naming what cannot be read."""
        return self.finish(self.encode(samples, pad))

    def _encode_texts(self, texts: Sequence[Any], pad: Literal["max_length", "longest"]) -> Arrays:
        encodings = self.tokenizer.encode_batch(list(texts))
        lengths = [len(encoding.ids) for encoding in encodings]
        if pad == "max_length" and not self.settings.max_length:
            raise ModelError("no maximum length has been chosen: 0", hint='set max_length, or pad="longest"')
        length = self.settings.max_length if pad == "max_length" else max(lengths, default=0)
        shape = (len(texts), length)
        stored: Arrays = {name: np.zeros(shape, np.int32 if name == "input_ids" else np.uint8) for name in self.settings.inputs}
        stored["input_ids"][:] = self.settings.pad_token_id
        for row, encoding in enumerate(encodings):
            place = slice(0, lengths[row]) if self.settings.padding_side == "right" else slice(length - lengths[row], length)
            values = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}
            for name in self.settings.inputs:
                stored[name][row, place] = values[name]
        return stored


def choose_max_length(tokenizer: Any, texts: Sequence[Any], limit: int = 0) -> int:
    """Tokens that hold 95 % of the texts whole, special tokens included, rounded up to a multiple of 8; at most `limit` (0: no limit).
    `tokenizer` must not truncate."""
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
    if not lengths:
        raise DataError("cannot choose a maximum length: no texts", hint="give training data, or set --max-length")
    needed = int(np.percentile(lengths, LENGTH_PERCENTILE, method="inverted_cdf"))
    rounded = max(1, -(-needed // LENGTH_MULTIPLE)) * LENGTH_MULTIPLE
    return min(rounded, limit) if limit else rounded


# ------------------------------------------------------------------------------------------------ settings of a model folder


def _input_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    if "vocab_size" in config:
        segments = config.get("model_type") == "bert" or (
            config.get("type_vocab_size", 0) > 1 and config.get("model_type") not in OFFSET_POSITIONS
        )
        return ("input_ids", "attention_mask", "token_type_ids") if segments else ("input_ids", "attention_mask")
    if "image_size" in config or "num_channels" in config:
        return ("pixel_values",)
    if "features" in config:
        return ("features",)
    raise ModelError(
        f"cannot tell what the model reads: model_type {config.get('model_type')!r}",
        hint="its config.json has none of vocab_size (text), image_size (image), features (vectors)",
    )


def _tokenizer_json(folder: Path) -> bytes:
    """`tokenizer.json` of the folder, made by transformers where only an older vocabulary is there."""
    path = folder / TOKENIZER_FILE
    if path.is_file():
        return path.read_bytes()
    vocabularies = [name for name in ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model") if (folder / name).is_file()]
    message = f"the model has no {TOKENIZER_FILE}: {folder}"
    if not vocabularies:
        raise ModelError(message, hint="save the model's tokenizer into the folder: tokenizer.save_pretrained(folder)")
    try:
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as temporary:
            AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).save_pretrained(temporary)
            return (Path(temporary) / TOKENIZER_FILE).read_bytes()
    except Exception as error:  # transformers raises whatever the missing converter raises
        raise ModelError(
            f"{message}; only {', '.join(vocabularies)}, which could not be converted",
            detail=str(error),
            hint="load it with transformers.AutoTokenizer where its converter is installed, and save_pretrained() it into the folder",
        ) from error


def _text_settings(names: tuple[str, ...], assets: Mapping[str, bytes], config: Mapping[str, Any], folder: Path) -> Preprocessing:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(assets[TOKENIZER_FILE].decode("utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"damaged {TOKENIZER_FILE}: {folder}", detail=str(error), hint="download or save the tokenizer again") from error
    described = {**_json(assets, "special_tokens_map.json", folder), **_json(assets, "tokenizer_config.json", folder)}
    token = described.get("pad_token") or "[PAD]"
    token = token["content"] if isinstance(token, dict) else token
    pad = tokenizer.token_to_id(token)
    pad = config.get("pad_token_id") if pad is None else pad
    if pad is None:
        raise ModelError(f"the tokenizer has no padding token: {folder}", hint='set "pad_token" in its tokenizer_config.json')
    limit = int(config.get("max_position_embeddings") or 0)
    if limit and config.get("model_type") in OFFSET_POSITIONS:
        limit -= int(pad) + 1
    side: Literal["left", "right"] = "left" if described.get("padding_side") == "left" else "right"
    return Preprocessing(modality="text", inputs=names, length_limit=limit, pad_token_id=int(pad), padding_side=side)


def _image_settings(names: tuple[str, ...], assets: Mapping[str, bytes], config: Mapping[str, Any], folder: Path) -> Preprocessing:
    described = _json(assets, "preprocessor_config.json", folder)
    size = described.get("size", config.get("image_size", 224))
    resize = _edges(size) if described.get("do_resize", True) else (0, 0)
    crop = _edges(described.get("crop_size", size)) if described.get("do_center_crop", False) else (0, 0)
    channels, normalize = int(config.get("num_channels", 3)), described.get("do_normalize", True)
    settings = Preprocessing(
        modality="image",
        inputs=names,
        channels=channels,
        resize=resize,
        crop=crop,
        resample=int(described.get("resample", 2)),
        rescale=float(described.get("rescale_factor", 1 / 255)) if described.get("do_rescale", True) else 1.0,
        mean=_per_channel(described.get("image_mean", 0.5) if normalize else 0.0, channels),
        std=_per_channel(described.get("image_std", 0.5) if normalize else 1.0, channels),
    )
    if 0 in settings.image_size:
        raise ModelError(
            f"the model's images have no fixed size: {size}",
            hint='give its preprocessor_config.json a "size" of height and width, or a "crop_size" with "do_center_crop"',
        )
    wanted = config.get("image_size")
    if wanted is not None and _edges(wanted) != settings.image_size:
        raise ModelError(
            f"preprocessor_config.json makes images of {settings.image_size}, the model takes {_edges(wanted)}: {folder}",
            hint="make the two files agree",
        )
    for name, values in (("image_mean", settings.mean), ("image_std", settings.std)):
        if len(values) != channels:
            raise ModelError(f"{name} has {len(values)} values for {channels} channels: {folder}", hint="give one per channel")
    return settings


def _edges(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return (int(size["height"]), int(size["width"])) if "height" in size else (int(size.get("shortest_edge", 0)), 0)
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    found = (float(values),) if isinstance(values, int | float) else tuple(float(value) for value in values)
    return found * channels if len(found) == 1 else found


def _preprocessor_config(settings: Preprocessing) -> bytes:
    """What a Hugging Face pipeline needs to do the same, for a model that came without."""
    height, width = settings.resize
    body = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": height, "width": width},
        "resample": settings.resample, "do_rescale": True, "rescale_factor": settings.rescale, "do_normalize": True,
        "image_mean": settings.mean, "image_std": settings.std,
    }  # fmt: skip
    return (json.dumps(body, indent=2) + "\n").encode()


def _json(assets: Mapping[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    try:
        body = json.loads(assets.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"damaged {name}: {folder}", detail=str(error), hint="download or save the model again") from error
    if not isinstance(body, dict):
        raise ModelError(f"{name} is not a JSON object: {folder}", hint="download or save the model again")
    return body


# ------------------------------------------------------------------------------------------------ canonical samples


def _text(raw: Any) -> Any:
    if isinstance(raw, str):
        return raw.strip()
    if isinstance(raw, tuple | list) and len(raw) == 2 and all(isinstance(part, str) for part in raw):
        return raw[0].strip(), raw[1].strip()
    raise DataError(f"not a text, nor a pair of texts: {_short(raw)}", hint="name the column of the texts with --text-column")


def _vector(raw: Any, features: int) -> npt.NDArray[np.float32]:
    try:
        vector = np.ascontiguousarray(raw, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"not a vector of numbers: {_short(raw)}", hint="every feature must be a number") from error
    if vector.ndim != 1 or (features and len(vector) != features):
        raise DataError(f"the model takes vectors of {features} numbers: shape {vector.shape}", hint="check the columns of the data")
    if not np.isfinite(vector).all():
        raise DataError(f"a vector holds what is no finite number: {_short(raw)}", hint="fill or leave out missing values")
    return vector


def image_shape(raw: Any) -> tuple[int, int, int]:
    """Height, width and channels (1: grey, 3: colour) of a raw image."""
    image = _opened(raw)
    return image.height, image.width, 1 if image.mode in ("1", "L", "LA") else 3


def _opened(raw: Any) -> Any:
    """A loaded Pillow image of 8 bits a channel, turned as its EXIF orientation says where it comes from a file."""
    from PIL import Image, ImageOps

    image = raw
    if isinstance(raw, Mapping):
        raw = raw.get("bytes") or raw.get("path")
    if isinstance(raw, str | Path | bytes | bytearray | memoryview):
        name = str(raw) if isinstance(raw, str | Path) else f"{len(raw)} bytes"
        try:
            with Image.open(raw if isinstance(raw, str | Path) else io.BytesIO(raw)) as opened:
                opened.load()
                image = ImageOps.exif_transpose(opened)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read image: {name}", detail=str(error), hint="replace the file, or leave it out") from error
    elif hasattr(raw, "__array__") and not isinstance(raw, Image.Image):
        image = Image.fromarray(_bytes_of(np.asarray(raw)))
    if not isinstance(image, Image.Image):
        raise DataError(f"not an image: {_short(raw)}", hint="give a path, the bytes of a file, a Pillow image or a uint8 array")
    if image.mode.startswith(("I", "F")):
        raise DataError(f"images of more than 8 bits per channel are not supported: mode {image.mode}", hint="convert them to 8 bits")
    return image


def _image(raw: Any, channels: int) -> Any:
    """The image in mode L or RGB."""
    if channels not in (1, 3):
        raise DataError(f"only models of 1 or 3 channels take images: {channels}", hint="use a grey or RGB model")
    return _opened(raw).convert("L" if channels == 1 else "RGB")


def _bytes_of(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """uint8 (H, W) or (H, W, C) of an array that holds 8-bit pixels: as bytes, or as bytes divided by 255; channels last or first."""
    if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
        steps = np.rint(array * 255)
        if np.abs(array * 255 - steps).max() < 1e-3:  # as ToTensor makes them: nothing is lost on the way back
            array = steps.astype(np.uint8)
    if array.dtype != np.uint8:
        raise DataError(f"an image array must be uint8, 0 to 255: {array.dtype}", hint="give the pixels before any normalisation")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise DataError(f"an image array must be (H, W), (H, W, C) or (C, H, W): shape {array.shape}", hint="give one image per sample")
    return np.ascontiguousarray(array)


def _pixels(image: Any, settings: Preprocessing) -> npt.NDArray[np.uint8]:
    """(C, H, W) after resizing and cropping."""
    height, width = settings.resize
    if height and not width:
        short = min(image.size)
        width, height = (height if edge == short else int(height * edge / short) for edge in image.size)
    if height and image.size != (width, height):
        image = image.resize((width, height), resample=settings.resample)
    if settings.crop != (0, 0):
        (height, width), (from_width, from_height) = settings.crop, image.size
        left, top = (from_width - width) // 2, (from_height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    array = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
