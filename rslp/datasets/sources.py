"""Sources of images: a pattern of paths becomes a list of files with keys, dates, bands and grids; without labels."""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rasterio.errors import RasterioError

from rslp.datasets.config import Images, Span
from rslp.datasets.grids import RasterFile, UnusableGrid, open_raster
from rslp.errors import DataError
from rslp.suggest import did_you_mean

_DIGITS = {"%Y": 4, "%y": 2, "%m": 2, "%d": 2, "%j": 3, "%H": 2, "%M": 2, "%S": 2}
_KEY = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")
# What rslearn can store.
_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32")


class Problems:
    """Collects what is wrong with a user's files, so that all of it is said at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, where: object, message: str) -> None:
        """Add a problem of a file (or of a row of one)."""
        self.lines.append(f"{where}: {message}")

    def raise_any(self) -> None:
        """Raise all problems.

        Raises:
            DataError: there are some.
        """
        if self.lines:
            unique = list(dict.fromkeys(self.lines))
            more = [f"… and {len(unique) - 20} more problems"] if len(unique) > 20 else []
            raise DataError("\n".join([*unique[:20], *more]))


@dataclass(frozen=True)
class Match:
    """A file that fits a pattern.

    Attributes:
        path: the file.
        keys: the values of the pattern's keys, without dates.
        span: the time range that the path gives, if it gives one.
    """

    path: Path
    keys: Mapping[str, str]
    span: Span | None = None


@dataclass(frozen=True)
class ImageFile(Match):
    """An image of one input.

    Attributes:
        raster: its header.
        indexes: 1-based numbers of the wanted bands in the file, in the wanted order.
    """

    raster: RasterFile = None  # type: ignore[assignment]
    indexes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """The images of one input.

    Attributes:
        name: the input.
        bands: names of the bands, in the order of ``indexes`` of the files.
        dtype: data type in which they are stored.
        nodata: the value of pixels without a measurement in the files; one other than 0 is stored as NaN.
        files: the images.
        notes: what was decided for them, in words.
    """

    name: str
    bands: tuple[str, ...]
    dtype: str
    nodata: float | None
    files: tuple[ImageFile, ...]
    notes: tuple[str, ...] = ()


def matches(pattern: str, folder: Path, problems: Problems) -> list[Match]:
    """The files that fit a pattern, in the order of their paths.

    Args:
        pattern: a path with keys in braces, ``{chip}``, and dates with a format, ``{date:%Y%m%d}`` or ``{start:…}`` and
            ``{end:…}``, and ``*`` for anything but a ``/``; relative to the folder.
        folder: the folder of the file that has the pattern.
        problems: takes what is wrong.
    """
    expression, glob, cursor, dates = "", "", 0, {}
    for key in _KEY.finditer(pattern):
        name, form = key[1], key[2]
        literal = pattern[cursor : key.start()]
        cursor = key.end()
        if not name.isidentifier() or (form is not None and name not in ("date", "start", "end")):
            problems.add(pattern, f"{key[0]} is no key; write {{chip}}, or for dates {{date:%Y%m%d}}")
            return []
        if form is not None:
            directives = re.findall("%.", form)
            if unknown := [part for part in directives if part not in _DIGITS]:
                problems.add(pattern, f"{key[0]}: {unknown[0]} is not known in dates; known: {', '.join(_DIGITS)}")
                return []
            dates[name] = form
            inner = re.sub("%.", lambda part: rf"\d{{{_DIGITS[part[0]]}}}", form)
        else:
            inner = "[^/]+"
        group = f"(?P={name})" if f"(?P<{name}>" in expression else f"(?P<{name}>{inner})"
        expression += _regex(literal) + group
        glob += _literal(literal) + "*"
    expression += _regex(pattern[cursor:])
    glob += _literal(pattern[cursor:])
    return _matching(pattern, re.compile(expression), glob, folder, dates, problems)


def _literal(text: str) -> str:
    return re.sub(r"([?[])", r"[\1]", text)


def _regex(text: str) -> str:
    return re.escape(text).replace(r"\*", "[^/]*")


def _matching(
    pattern: str, expression: re.Pattern[str], glob: str, folder: Path, dates: Mapping[str, str], problems: Problems
) -> list[Match]:
    base, relative = (Path("/"), glob.lstrip("/")) if Path(pattern).is_absolute() else (folder, glob)
    prefix = "/" if Path(pattern).is_absolute() else ""
    result = []
    for path in sorted(base.glob(relative)):
        match = expression.fullmatch(prefix + path.relative_to(base).as_posix())
        # A normalised path, where the pattern starts with `./` or `../`.
        match = match or expression.fullmatch(path.as_posix())
        if match is None or not path.is_file():
            continue
        keys = match.groupdict()
        try:
            texts = {name: dt.datetime.strptime(keys.pop(name), form) for name, form in dates.items()}
        except ValueError as error:
            problems.add(path, f"its name has no date of {pattern}: {error}")
            continue
        result.append(Match(path, keys, _span(texts)))
    if not result and not problems.lines:
        missing = next(
            (part for part in reversed((base / relative).parents) if "*" not in str(part) and not part.exists()), None
        )
        reason = f"; there is no folder {missing}" if missing else ""
        problems.add(pattern, f"no file has a path of this pattern, below {base}{reason}")
    return result


def _span(dates: Mapping[str, dt.datetime]) -> Span | None:
    if not dates:
        return None
    days = [date.replace(tzinfo=dt.UTC) for date in dates.values()]
    return min(days), max(days) + dt.timedelta(days=1)


def read_source(name: str, images: Images, folder: Path, problems: Problems) -> Source:
    """List the images of one input and read their headers.

    Args:
        name: the input.
        images: its description.
        folder: the folder that paths are relative to.
        problems: takes what is wrong, with the file.
    """
    files = []
    for match in matches(str(images.files), folder, problems):
        span = match.span or images.date
        raster = _header(match.path, problems)
        if span is None:
            problems.add(
                f"images.{name}",
                "when were they taken? Set date: [2022-01-01, 2022-05-31], or write {date:%Y%m%d} into files",
            )
            break
        if raster is not None:
            files.append(ImageFile(match.path, match.keys, span, raster))
    _refuse_twice(name, files, problems)
    if not files:
        return Source(name, (), "uint8", None, ())
    bands = tuple(images.bands or _common_bands(files))
    files = [file for file in (_with_bands(file, bands, images.bands is not None, problems) for file in files) if file]
    dtype, notes = _dtype([file.raster.dtype for file in files], problems, name)
    declared = Counter(file.raster.nodata for file in files)
    if images.nodata is None and len(declared) > 1:
        problems.add(f"images.{name}", f"its files declare different nodata values: {', '.join(map(str, declared))}")
    nodata = images.nodata if images.nodata is not None else next(iter(declared), None)
    if nodata is not None and nodata != 0:
        dtype = "float32"
        notes.append(f"{name}: pixels of the nodata value {nodata:g} are stored as NaN, in float32")
    return Source(name, bands, dtype, nodata, tuple(files), tuple(notes))


def _header(path: Path, problems: Problems) -> RasterFile | None:
    try:
        if path.stat().st_size == 0:
            raise UnusableGrid("is empty (0 bytes)")
        return open_raster(path)
    except UnusableGrid as error:
        problems.add(path, str(error))
    except (RasterioError, OSError) as error:
        problems.add(path, f"can't be read as a raster: {error}")
    return None


def read_headers(pattern: str, folder: Path, problems: Problems) -> list[tuple[Match, RasterFile]]:
    """The files of a pattern with their headers, for rasters of labels."""
    pairs = [(match, _header(match.path, problems)) for match in matches(pattern, folder, problems)]
    return [(match, raster) for match, raster in pairs if raster is not None]


def _refuse_twice(name: str, files: Sequence[ImageFile], problems: Problems) -> None:
    """Refuse two files with the same keys and date; files without keys are told apart by their grid."""
    first: dict[object, ImageFile] = {}
    for file in files:
        identity = (tuple(file.keys.items()) or file.raster.grid, file.span)
        if identity in first:
            problems.add(file.path, f"has the same keys and date as {first[identity].path} in images.{name}")
        first.setdefault(identity, file)


def _common_bands(files: Sequence[ImageFile]) -> tuple[str, ...]:
    """The band names that most files have; numbers where files describe none."""
    counts = Counter(file.raster.bands for file in files)
    bands = counts.most_common(1)[0][0]
    return tuple(band or f"B{number}" for number, band in enumerate(bands, 1))


def _with_bands(file: ImageFile, bands: Sequence[str], chosen: bool, problems: Problems) -> ImageFile | None:
    """The file with the numbers of the wanted bands."""
    described = [band for band in file.raster.bands if band]
    if not described or (chosen and not set(described) & set(bands)):
        if len(file.raster.bands) == len(bands):
            return ImageFile(file.path, file.keys, file.span, file.raster, tuple(range(1, len(bands) + 1)))
        problems.add(
            file.path, f"has {len(file.raster.bands)} bands without names that fit, wanted: {', '.join(bands)}"
        )
        return None
    missing = [band for band in bands if band not in described]
    if missing:
        hint = did_you_mean(missing[0], described)
        problems.add(file.path, f"has no band {', '.join(missing)}{hint}; its bands: {', '.join(described)}")
        return None
    indexes = tuple(file.raster.bands.index(band) + 1 for band in bands)
    return ImageFile(file.path, file.keys, file.span, file.raster, indexes)


def _dtype(dtypes: Sequence[str], problems: Problems, name: str) -> tuple[str, list[str]]:
    """The type in which rslearn stores values of some types, and a note if that is another one."""
    try:
        common = np.result_type(*dtypes).name if dtypes else "uint8"
    except TypeError:
        common = "complex"
    if common in _DTYPES:
        return common, []
    if common in ("float16", "float64", "int64", "uint64"):
        return "float32", [f"{name}: {common} is stored as float32"]
    problems.add(f"images.{name}", f"its values are {common}; rslearn stores {', '.join(_DTYPES)}")
    return "float32", []
