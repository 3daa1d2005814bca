"""What is checked of an adapter folder before any of it is believed: kinds, places, sizes, names and shapes.

Only safetensors and JSON are read, both of which hold no code, and no file is opened before it is known to be a plain
one inside the folder. A folder that passes may still be wrong; it can neither run anything nor take all memory.
"""

import errno
import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load

from trimtab.errors import ArtefactError, some

_AGAIN = "copy the whole adapter folder again"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FLOATS = {"F32", "F16", "BF16"}
_MOST_BYTES = {"trimtab.json": 4 << 20, "adapter_config.json": 1 << 20, "tokenizer.json": 64 << 20}
"""The largest in use: 17 MB of tokenizer.json (XLM-RoBERTa), and 130 bytes a label, probes included. Reading JSON holds
the interpreter, up to a second for 4 MB that were made for it."""
OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM)
"""What the system refuses because of the file itself; anything else may be over in a moment."""
TENSORS = "adapter_model.safetensors"
_MOST_HEADER = 1 << 20  # 120 bytes a tensor


def check_files(folder: Path) -> None:
    """Looks at the files of an adapter folder without opening one. Files that are missing are for the reader to tell.

    Raises:
        ArtefactError: a file is a link that leads out of the folder, is no plain file, is larger than one can be, or
            the tensors are pickled.
    """
    for name in (*_MOST_BYTES, TENSORS):
        file = folder / name
        if not os.path.lexists(file):
            continue
        if not _leads_inside(file, folder):
            raise ArtefactError(
                "adapter.outside",
                f"{name} is a link that leads out of the adapter's folder or nowhere, so it is not followed.",
                where=f"{file} -> {os.readlink(file) if file.is_symlink() else '?'}",
                mend="if you trust what it leads to: cp -rL FOLDER COPY",
            )
        if not file.is_file():
            raise ArtefactError("adapter.damaged", f"{name} is not a plain file.", where=str(file), mend=_AGAIN)
        if (size := file.stat().st_size) > (most := _MOST_BYTES.get(name, size)):
            raise ArtefactError(
                "adapter.too_large",
                f"{name} has {size:,} bytes; none of this kind has more than {most:,}.",
                where=str(file),
                mend=_AGAIN,
            )
    if (folder / TENSORS).exists():
        return
    if pickled := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES):
        # A stranger chose the name, and the command below is meant for a shell.
        name = pickled[0] if re.fullmatch(r"[\w.-]+", pickled[0]) else "FILE"
        raise ArtefactError(
            "adapter.pickle",
            f"The tensors are pickled ({pickled[0]!r}); reading a pickle can run whatever code it holds, so trimtab "
            "reads safetensors only.",
            where=str(folder),
            mend=f'to convert tensors and nothing else, in that folder: python -c "import torch, safetensors.torch; '
            f"safetensors.torch.save_file(torch.load('{name}', weights_only=True), '{TENSORS}')\"",
        )


def _leads_inside(file: Path, folder: Path) -> bool:
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def read_tensors(file: Path, expected: Mapping[str, tuple[int, ...]], sha256: str) -> dict[str, torch.Tensor]:
    """Reads a file of tensors that is, by its header, what was expected.

    The file is read once, and not mapped: one that is cut or replaced while it is read is refused, and harms nobody.

    Raises:
        ArtefactError: it cannot be read; a tensor is missing, extra, of another shape or kind, or not finite; the sum
            of its bytes is another.
    """
    most = _MOST_HEADER + sum(4 * math.prod(shape) for shape in expected.values())
    try:
        if (size := file.stat().st_size) > most:
            problems = [f"it has {size:,} bytes, expected {most - _MOST_HEADER:,} and a header"]
            # Its header alone, mapped: what it names may be what is wrong.
            with safe_open(file, "np") as header:
                names = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118
            found = {name: (tuple(one.get_shape()), str(one.get_dtype())) for name, one in names.items()}
            problems = _differences(found, expected) or problems
            raise ArtefactError("adapter.tensors", f"{some(problems)}.", where=str(file), mend=_AGAIN)
        data = file.read_bytes()
        stored = {name: (tuple(one["shape"]), str(one["dtype"])) for name, one in deserialize(data)}  # type: ignore[no-untyped-call]
        problems = _differences(stored, expected)
        if not problems:
            tensors: dict[str, torch.Tensor] = load(data)
            problems = [f"{name} is not finite" for name, one in tensors.items() if not bool(torch.isfinite(one).all())]
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in OF_THE_FILE:
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArtefactError(
            "adapter.damaged", f"The adapter's tensors cannot be read: {reason}", where=str(file), mend=_AGAIN
        ) from None
    if problems:
        raise ArtefactError("adapter.tensors", f"{some(problems)}.", where=str(file), mend=_AGAIN)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtefactError(
            "adapter.tensors_changed",
            f"{file.name} is not what training wrote: its sha256 differs.",
            where=str(file.parent),
            mend=_AGAIN,
        )
    return tensors


def _differences(
    found: Mapping[str, tuple[tuple[int, ...], str]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What a file's shapes and kinds are that they should not be."""
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} does not belong here" for name in found if name not in expected),
        *(
            f"{name} has shape {found[name][0]}, expected {shape}"
            for name, shape in expected.items()
            if name in found and found[name][0] != shape
        ),
        *(f"{name} holds {kind}, expected real numbers" for name, (_, kind) in found.items() if kind not in _FLOATS),
    ]
