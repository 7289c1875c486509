"""Owns how pictures are described on the wire: what a model wants of them, and what a request brings. Every process.

`shared.pictures` does what is said here; fields are appended as in `shared.protocol`.
"""

from __future__ import annotations

import msgspec


class PicturePart(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Parent of what is said of pictures."""


class Rule(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Parent of the ways in which a picture is cut: tagged by its class name."""


class OneCrop(Rule, frozen=True):
    """The whole picture, whatever its proportions, becomes one crop."""


class OverlappingTiles(Rule, frozen=True):
    """The whole picture as one crop, then a canvas of tiles that share margins; all of them give `crop_tokens` together."""

    patch_size: int  # pixels
    margin_patches: int
    max_crops: int


class EdgeTiles(Rule, frozen=True):
    """The longer edge is scaled to `longest_edge`, both edges then to whole crops; the tiles come first, the whole last.

    Not `is_split`: the whole alone.
    """

    longest_edge: int  # pixels
    is_split: bool = True


class RatioTiles(Rule, frozen=True):
    """As many tiles, within bounds, as have the proportions nearest to the picture's, then the whole if they are several."""

    min_tiles: int
    max_tiles: int


class PanAndScan(Rule, frozen=True):
    """The whole, then pieces along the longer edge of a picture that is at least `min_ratio` times as long as wide."""

    min_crop: int  # pixels of the picture
    max_crops: int
    min_ratio: float


class FreeSize(Rule, frozen=True):
    """One crop of nearly the picture's own proportions: each side is whole squares of `crop_size`, the area within bounds.

    A square gives `crop_tokens` positions, row by row.
    """

    min_pixels: int  # area
    max_pixels: int


class ClipSize(FreeSize, frozen=True):
    """As `FreeSize` for a frame, with an area that is within bounds for all frames of its clip together."""

    num_frames: int = 1  # of the clip, see `shared.clips.frame_spec`


class FreeTiles(Rule, frozen=True):
    """One crop as `FreeSize` has it, in whole squares of `unit`. A picture whose area in such squares is beyond `large_pixels`
    becomes tiles of `crop_size` in the grid nearest in proportions, then, if it `shows_whole`, such a crop of the whole.

    A square gives one position.
    """

    unit: int  # pixels of a square's side
    min_pixels: int  # area of a crop of any size
    max_pixels: int
    large_pixels: int
    least_side: int  # what a shorter side counts as when the area is judged
    min_tiles: int
    max_tiles: int  # 1: never any
    shows_whole: bool = True


class ImageLayout(PicturePart, frozen=True):
    """How a picture is written into a prompt's text. `run` in the texts stands for the positions of one crop."""

    placeholder: str = (
        ""  # what the chat template writes; empty: pictures follow the prompt's first id, unwritten
    )
    run: str = ""  # the special token in whose places crops' features stand
    whole: str = ""  # a picture of one crop
    before: str = ""  # a picture of several begins with this
    tile: str = ""  # {row} and {col}, from 1
    tile_gap: str = ""  # between two tiles of a row
    row_end: str = ""
    overview: str = ""  # the crop that shows the whole
    after: str = ""


class ClipLayout(PicturePart, frozen=True):
    """How a clip is written into a prompt's text, with `ImageLayout.run` for each group of its frames.

    `before` may have {frames_in_words} and {duration} (H:MM:SS), `frame` {number} from 1, {clock} (MM:SS of its first frame) and
    {seconds} (the middle of its first and last frame, with one decimal).
    """

    placeholder: str = ""  # what the chat template writes for a video; empty: it knows none
    before: str = ""
    frame: str = ""  # a group
    gap: str = ""  # between two of them
    after: str = ""


class ClipSpec(PicturePart, frozen=True):
    """How a model reads a clip: pictures with times, which are frames of one video. What is not said here is as for pictures."""

    rule: OneCrop | EdgeTiles | FreeSize | ClipSize  # of a frame
    resample: str
    layout: ClipLayout
    max_frames: int  # of one request
    fps: float  # frames a second, where a request says nothing of their times
    group: int = 1  # frames that are encoded together and give as many positions as one of them
    max_tokens: int = (
        0  # positions of a clip, for which frames become smaller where the rule can; 0: no bound of its own
    )
    max_group_tokens: int = 0  # likewise of a group
    steps_per_second: float = 0.0  # of the time axis of positions; 0: each group stands at a place of its own


class ImageSpec(PicturePart, frozen=True):
    """How a model's pictures are prepared and placed: all that a gateway needs for it. A crop is square, in pixels, unless the rule says otherwise."""

    crop_size: int
    crop_tokens: int  # positions in the prompt that a crop takes
    rule: OneCrop | OverlappingTiles | EdgeTiles | RatioTiles | PanAndScan | FreeSize | ClipSize | FreeTiles
    resample: str = "lanczos"  # lanczos | bicubic | bilinear | nearest
    layout: ImageLayout = ImageLayout()
    attends: str = (
        "causal"  # within a run: causal | block (both ways) | prefix (so, with all that stands before it)
    )
    max_images: int = 1  # of one request
    max_bytes: int = 128 << 20  # of pixels, all pictures of one request together
    position_axes: int = (
        1  # 3: a picture's positions are (time, row, column), see `worker.schedule.rotary_places`
    )
    clip: ClipSpec | None = None  # None: no videos, not as frames either


class Sheet(PicturePart, frozen=True):
    """Pixels of a picture that travel as one payload frame, and how many crops the device cuts of them: `rows × cols`.

    A group of a clip's frames has them one below the other.
    """

    rows: int
    cols: int
    height: int  # of all its pixels
    width: int


class ImageInput(PicturePart, frozen=True):
    """One picture of a request, already decoded, resized and laid out by the gateway as the model's `ImageSpec` says.

    A payload frame for each sheet follows the message, uint8 RGB, row-major HWC. Text-only models never see one.
    """

    sheets: list[Sheet]  # in the order in which the prompt has their crops
    runs: list[
        tuple[int, int]
    ]  # (index into the prompt's ids before which positions are inserted, how many of the picture's)
    digest: bytes  # sha256 over sizes and frames: the key of cached features and pages
    num_frames: int = 0  # of a clip, if it is a group of those; 0: a still picture
    moment: int = 0  # steps on the time axis behind its clip's first group
    is_continued: bool = (
        False  # its run follows the one of the group before it, and they share a place but for the time
    )
