"""Looking at a whole data set before anything is computed: hashes, sizes, labels, grey levels."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from os.path import realpath
from pathlib import Path

from featprobe.backbones.backbone import Backbone
from featprobe.cache import Row
from featprobe.datasets import DataSet, Sample
from featprobe.datasets.duplicates import exact_copies, in_several_splits, two_labels, two_labels_text
from featprobe.datasets.images.pixels import counted_levels
from featprobe.datasets.images.reading import Header, hash_image, header_of, pixel_notes, read_levels, training_window
from featprobe.datasets.label_sets import check_held, mixed_verdicts, verdicts
from featprobe.datasets.samples import listed
from featprobe.datasets.set_notes import copies_in, copy_notes
from featprobe.errors import DataError, counted
from featprobe.geometry import Placement, Size, default_size, place
from featprobe.intensity import Intensity, default_intensity
from featprobe.io.threads import in_threads
from featprobe.specs import RECIPE_VERSION, DataInfo, FeatureRecipe
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.parts import parts_of
from featprobe.stages.progress import counting
from featprobe.targets import IGNORE, decode_semantic, encode_instances, encode_semantic

CLIPPED_WARNING = 0.01
UNREAD = Header((1, 1), 0, 1, "", False)


@dataclass(frozen=True)
class Found:
    """The contents of one sample's files; `reason` says why it can't be used, "" if it can.

    labels: of the image as a whole, see `Target`. copies: objects that stand there more than once.
    """

    sample: Sample
    image_hash: str = ""
    header: Header = UNREAD
    semantic: bytes = b""
    instances: bytes = b""
    labels: tuple[int, ...] | None = None
    reason: str = ""
    copies: tuple[str, ...] = ()

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.header.size


@dataclass(frozen=True)
class Survey:
    """A whole data set, looked at; `found` is in the order of the data set's samples."""

    data: DataSet
    found: tuple[Found, ...]

    @property
    def bad(self) -> list[Found]:
        """The samples that can't be used."""
        return [found for found in self.found if found.reason]

    @property
    def headers(self) -> list[tuple[str, Header]]:
        """Id and header of each image that can be used."""
        return [(found.sample.id, found.header) for found in self.found if not found.reason]

    @property
    def fingerprint(self) -> str:
        """sha256 over classes, ids, groups, splits, image hashes and labels; over labels of images where there are."""
        running = hashlib.sha256(json.dumps([self.data.classes, self.data.tasks, self.data.category_ids]).encode())
        names = self.data.label_names
        if names:
            running.update(json.dumps(names.to_json(), sort_keys=True).encode())
        for f in self.found:
            text = [f.sample.id, f.sample.group, f.sample.split, f.image_hash, f.size]
            running.update(json.dumps(text).encode())
            running.update(hashlib.sha256(f.semantic).digest() + hashlib.sha256(f.instances).digest())
            if names:
                running.update(json.dumps(f.labels).encode())
        return running.hexdigest()


def survey(data: DataSet, *, workers: int, skip_bad: bool, quiet: bool) -> Survey:
    """Hash every image, read its size and encode its labels.

    Raises DataError for the first sample that can't be used, or only keeps why with `skip_bad`.
    """

    def look(sample: Sample) -> Found:
        found = Found(replace(sample, labels=""))  # they are kept as the cache keeps them
        try:
            image_hash = hash_image(sample.image)
            header = header_of(sample.image)
            target = data.read_target(sample, header.size)
            check_held(target.labels, data.label_names, f"{data.root}, image {sample.id}")
            semantic, instances = encode_semantic(target.semantic), encode_instances(target.instances, target.image_id)
            copies = tuple(copies_in(target, data.classes))
            found = Found(found.sample, image_hash, header, semantic, instances, target.labels, copies=copies)
            if skip_bad:
                read_levels(sample.image)  # a truncated one must not spoil the intensity window
        except DataError as error:
            if not skip_bad:
                raise skippable(error) from error
            return replace(found, reason=str(error))
        return found

    with in_threads(look, data.samples, workers) as results:
        found = tuple(counting(results, len(data.samples), "looking", "img", quiet=quiet))
    result = _of_one_label(Survey(data, found), skip_bad)
    if len(result.bad) == len(found):
        raise DataError(f"No image of {data.root} can be used. The first: {found[0].reason}")
    return result


def _of_one_label(surveyed: Survey, skip_bad: bool) -> Survey:
    """The survey, once no image stands in two classes where one is meant. Raises DataError, as `survey` does."""
    data, found = surveyed.data, surveyed.found
    copies = [f.sample for f in found], [f.image_hash for f in found], [f.labels for f in found]
    twice = two_labels(*copies, data.label_names)
    if not twice:
        return surveyed
    error = DataError(two_labels_text(data, twice))
    if not skip_bad:
        raise skippable(error)
    bad = {own for same in twice for own, _ in same}
    return Survey(data, tuple(replace(f, reason=str(error)) if f.sample.id in bad else f for f in found))


def skippable(error: DataError) -> DataError:
    """The error of one sample, with how to go on without it."""
    return type(error)(f"{error}\nTo omit what can't be used, and list it:  --skip-bad")


def training_images(surveyed: Survey) -> list[Sample]:
    """Samples of the training split that can be read."""
    return [f.sample for f in surveyed.found if f.sample.split == "train" and not f.reason]


def choose_intensity(surveyed: Survey, asked: Intensity | None) -> tuple[Intensity, tuple[float, float] | None]:
    """The intensity policy, and the window of raw levels that it means for this data set. asked: None for the default.

    Raises DataError when images of 8 bits, of 16 bits or of fractions stand in one set, which no single window can
    serve, and for fractions that are to be divided by the largest value of their number format.
    """
    bits = sorted({header.bits for _, header in surveyed.headers})
    if len(bits) > 1:
        mixed = " and ".join(f"{b}-bit" for b in bits)
        raise DataError(
            f"{surveyed.data.root} mixes {mixed} images: no single intensity window fits both.\n"
            f"  wanted  images of one depth\n  found   {pixel_notes(surveyed.headers)[0]}\n"
            "Nothing was computed. Remove the few, or write all in one depth."
        )
    policy = asked or default_intensity(bits[0])
    if policy.kind == "none" and bits == [32]:
        raise DataError(
            f"{surveyed.data.root} holds images of fractions or signed levels, which have no largest value.\n"
            "  wanted  an intensity policy with a window\n  found   none\n"
            "Levels in [0, 1] are taken as they are by --intensity window:0:1"
        )
    try:
        return policy, training_window((s.image for s in training_images(surveyed)), policy)
    except DataError as error:
        raise skippable(error) from error


def clipped_share(surveyed: Survey, window: tuple[float, float] | None) -> float | None:
    """Share of the training images' annotated foreground pixels that lie outside of the window; empty ones don't count.

    None without a window, without masks, or without foreground.
    """
    if window is None:
        return None
    clipped = annotated = 0
    for f in surveyed.found:
        if f.semantic and f.sample.split == "train" and not f.reason:
            labels = decode_semantic(f.semantic)
            levels = counted_levels(read_levels(f.sample.image)[(labels > 0) & (labels != IGNORE)])
            annotated += levels.size
            clipped += int(((levels < window[0]) | (levels > window[1])).sum())
    return clipped / annotated if annotated else None


def make_recipe(surveyed: Survey, backbone: Backbone, options: ExtractOptions) -> FeatureRecipe:
    """All that decides the features of a data set under a backbone, as the options say. Raises DataError."""
    tiling, fit = options.tiling, options.fitted
    whole = default_size([f.size for f in surveyed.found if not f.reason])
    asked = options.size or (whole if tiling is None else (tiling.tile, tiling.tile))
    policy, window = choose_intensity(surveyed, options.policy)
    recipe = FeatureRecipe(
        label=backbone.spec.label,
        backbone=backbone.identity,
        weights_sha256=backbone.sha256,
        levels=backbone.levels,
        final_norm=backbone.final_norm,
        size=asked,
        frame=place(asked, asked, fit, backbone.multiple).frame,
        fit=fit,
        intensity=str(policy),
        window=window,
        mean=backbone.mean,
        std=backbone.std,
        interpolation=backbone.interpolation,
        dtype=options.dtype,
        store=options.store,
    )
    if tiling:
        recipe = replace(recipe, **asdict(tiling))
    if any(header.empty for _, header in surveyed.headers):
        recipe = replace(recipe, empty_pixels="0")
    recipe = replace(recipe, views=(*recipe.views, *(options.views or ())))
    return replace(recipe, version=RECIPE_VERSION) if recipe.in_parts else recipe


def make_rows(surveyed: Survey, recipe: FeatureRecipe, multiple: int) -> tuple[list[Row], list[Row]]:
    """The cache's rows, and the images that they are parts of, in the order of the data set's samples.

    No images where the rows are whole images themselves.
    """
    images = [
        Row(
            id=f.sample.id,
            group=f.sample.group,
            split=f.sample.split,
            image=_below(f.sample, surveyed.data),
            image_hash=f.image_hash,
            placement=Placement(f.size, f.size, f.size)
            if recipe.in_parts
            else place(f.size, recipe.size, recipe.fit, multiple),
            semantic=f.semantic,
            instances=f.instances,
            reason=f.reason,
            labels=f.labels,
        )
        for f in surveyed.found
    ]
    if not recipe.in_parts:
        return images, []
    rows = [part for i, image in enumerate(images) for part in parts_of(image, recipe, multiple, i)]
    return rows, [replace(image, reason="") for image in images]


def describe(surveyed: Survey, recipe: FeatureRecipe) -> DataInfo:
    """The facts about its data set that the cache keeps, with the share that the intensity window clips."""
    data = surveyed.data
    clipped = clipped_share(surveyed, recipe.window)
    notes = [*data.notes, *pixel_notes(surveyed.headers)]
    if clipped is not None and clipped > CLIPPED_WARNING:
        notes.append(f"the intensity window clips {clipped:.1%} of the annotated pixels; see --intensity")
    copies = exact_copies([f.sample for f in surveyed.found], [f.image_hash for f in surveyed.found])
    leaking = [own[0].id for own in copies if in_several_splits(own)]
    if leaking:
        notes.append(
            f"{counted(len(leaking), 'image stands', 'images stand')} in more than one split, byte for byte: "
            f"{listed(leaking)}"
        )
    good = verdicts(data.label_names, [f.labels for f in surveyed.found])
    notes += mixed_verdicts([f.sample.group for f in surveyed.found], [f.sample.split for f in surveyed.found], good)
    notes += copy_notes([(f.sample.id, f.copies) for f in surveyed.found])
    if surveyed.bad:
        notes.append(
            f"{counted(len(surveyed.bad), 'sample')} can't be used: {listed([f.sample.id for f in surveyed.bad])}"
        )
    root = str(data.root.resolve())
    return DataInfo(
        data.name, root, data.classes, data.tasks, surveyed.fingerprint, clipped, tuple(notes), data.category_ids,
        surveyed.headers[0][1].bits, data.label_names,
    )  # fmt: skip


def _below(sample: Sample, data: DataSet) -> str:
    image, root = Path(realpath(sample.image)), data.root.resolve()  # a link to itself is no error here
    return image.relative_to(root).as_posix() if image.is_relative_to(root) else str(image)
