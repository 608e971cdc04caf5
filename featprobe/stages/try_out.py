"""A folder of images to an answer in minutes: look, check, two backbones, a head on each, a page."""

import json
import math
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from featprobe.cache import MISSING, Cache, open_cache, read_states
from featprobe.datasets import DataSet
from featprobe.datasets.images.reading import header_of
from featprobe.errors import DataError, FeatprobeError, FileKindError, ProbeError, counted
from featprobe.geometry import MOST_PIXELS, Fit, Size, parse_size
from featprobe.image_labels import ImageLabels
from featprobe.io.disk import below, read_json, write_whole
from featprobe.io.fields import Fault, limits, made
from featprobe.io.threads import in_threads
from featprobe.kinds import HeadKind, kind_of, kinds_of
from featprobe.machine import available_memory, free_disk, minutes_text, time_text
from featprobe.scores import SCORES
from featprobe.specs import SIZES, BackboneSpec, CacheStore
from featprobe.splitting import SplitChoice
from featprobe.stages.comparison.compare import Comparison, compare
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import READ_AS, ExtractOptions
from featprobe.stages.extraction.plan import Plan, plan
from featprobe.stages.partition import Partition, single_splits
from featprobe.stages.training.agenda import Agenda, alike, foreseen_each
from featprobe.stages.training.asked import checked as with_defaults
from featprobe.stages.training.probe import show
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.training.run import Say, run
from featprobe.stages.training.training import Training
from featprobe.stages.upkeep.check import FAULTS, DataCheck, check
from featprobe.stages.upkeep.first_look import aim_at
from featprobe.stages.upkeep.starter import BACKBONES
from featprobe.stages.workspace import Workspace, backbone_of

MINUTES = 10.0
SPARE = 0.5  # share of the minutes that a plan may fill: machines are shared, and times are guessed
HEAD, HEAD_SECONDS = 0.1, 4.0  # of a solved head: seconds per second of its extraction, and beside that
SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)  # of the sides of the median image
STEP, LEAST = 32, 64  # pixels: sides of scaled images are multiples of the first, and at least the second
TIMED_PIXELS = 300_000  # most pixels of an image at which a backbone is timed
TIMED_IMAGES = 4
MOST_IMAGES, BATCH_PIXELS = 16, 1 << 22  # of a batch: images, and pixels as far as one image allows it
DISK_SHARE, MEMORY_SHARE = 4, 2  # features of all backbones take at most one part in so many of what is free
UNEVEN = 1.5  # ratio of the widest to the narrowest shape of images from which on shapes are kept
SHOWN = 6  # test images on the sheet of each head
PLAN, LARGEST_PLAN, PROBE = "plan.json", 1 << 20, "featprobe probe "


@dataclass(frozen=True)
class TryOptions:
    """How to try a set; see `featprobe try --help` for each.

    backbones: names; NAME-random is NAME with seeded random weights. minutes: that it may take, from which the size of
    the images follows. size: instead. read_as: how the set is read, by the names of `ExtractOptions`.
    """

    backbones: tuple[str, ...] = BACKBONES
    minutes: float = MINUTES
    size: str | None = None
    device: str | None = None
    quiet: bool = False
    read_as: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outline:
    """What a try settled before it computed anything. It is kept, so that the same command goes on with it.

    asked: what the user asked for, as text. size: (height, width), pixels. each: predicted seconds of each extraction,
    by the name of its backbone. reasons: for the choices, for people.
    """

    asked: str
    task: str
    head: str
    labels: ImageLabels
    split: str
    size: Size
    fit: Fit
    store: CacheStore
    batch_size: int
    each: Mapping[str, float]
    reasons: tuple[str, ...]

    def faults(self) -> list[Fault]:
        """Values that no plan has, from a file."""
        return limits({
            "size": (min(self.size) >= 1 and math.prod(self.size) <= MOST_PIXELS, SIZES, self.size),
            "batch_size": (1 <= self.batch_size <= MOST_IMAGES, f"1 to {MOST_IMAGES}", self.batch_size),
        })  # fmt: skip

    @property
    def kind(self) -> HeadKind:
        """The kind of its heads. Raises ProbeError for one that is not known here."""
        return kind_of(self.task, self.head)

    @property
    def choice(self) -> SplitChoice:
        """The parsed split. Raises DataError for a text that is none."""
        return ProbeOptions(split=self.split).choice

    def seconds(self, shares: Mapping[str, float] | None = None) -> float:
        """Predicted time of extractions and solved heads. shares: of each extraction that are missing; None: all."""
        heads = self.choice.folds or 1
        each = (own * ((shares or {}).get(name, 1.0) + HEAD * heads) for name, own in self.each.items())
        return sum(each) + HEAD_SECONDS * heads * len(self.each)


@dataclass(frozen=True)
class Tried:
    """What a try gave. commands: that give the same by hand. further: commands that go on from there, each with what it
    is for. seconds: from its begin to its end."""

    checked: DataCheck
    outline: Outline
    comparison: Comparison
    page: Path
    commands: tuple[str, ...]
    further: tuple[tuple[str, str], ...]
    seconds: float

    @property
    def answer(self) -> str:
        """The sentences of the comparison, a line each: what is found, and which backbone is ahead."""
        return "\n".join(self.comparison.answer[0][1])


def try_out(
    workspace: Workspace,
    name: str,
    options: TryOptions | None = None,
    say: Say = lambda line: None,
    agree: Callable[[float], bool] = lambda seconds: True,
    show_check: Callable[[DataCheck], None] = lambda checked: None,
) -> Tried | None:
    """Look at a data set, check it, extract it under the backbones, train a head on each, and write a page.

    say: gets the plan first, then what is being done. agree: is asked, with the predicted seconds, before anything is
    computed; where it says no, nothing is written, and the result is None. show_check: gets what the check found.
    What is there already is not computed again. Raises FeatprobeError.
    """
    options, begun = options or TryOptions(), time.perf_counter()
    if not options.backbones or not 0 < options.minutes < math.inf:
        raise ProbeError("Nothing can be tried without a backbone, or in no time. Nothing was computed.")
    specs = {own: backbone_of(workspace, own) for own in options.backbones}
    data = workspace.data_set(name, options.read_as.get("format"), complete=False, **_read(options))
    checked = check(data, quiet=options.quiet)
    show_check(checked)
    folder = _folder(workspace, data)
    skip_bad = any(finding.kind in FAULTS for finding in checked.findings)
    outline = _kept(folder, _asked(options, checked)) or _outline(workspace, name, data, checked, options, skip_bad)
    left = outline.seconds(_shares_left(workspace, data, outline, specs))
    for line in _plan_lines(outline, options, checked, folder, left):
        say(line)
    if not agree(left):
        return None
    write_whole(folder / PLAN, json.dumps(asdict(outline), indent=1))
    caches = []
    for number, (own, spec) in enumerate(specs.items(), start=1):
        say(f"[{number}/{len(specs)}] extract {own}")
        how = _extraction(workspace, name, outline, options, skip_bad)
        caches.append(open_cache(extract(workspace, spec, name, how).path))
    trainings = [own for cache in caches for own in _trainings(workspace, cache, outline, options)]
    if not _train(trainings, say, agree, 60 * options.minutes - (time.perf_counter() - begun)):
        return None
    folders = [own for training in trainings for own in training.folders]
    comparison = compare(workspace, folder, quiet=options.quiet, folders=folders)
    heads = [command for item in comparison.sets for command in item.commands if command.startswith(PROBE)]
    by_hand = [*(cache.contents.command for cache in caches), *heads]
    return Tried(
        checked, outline, comparison, comparison.files[0], (*by_hand, "featprobe compare"),
        further(workspace, data, outline, options), time.perf_counter() - begun,
    )  # fmt: skip


def _read(options: TryOptions) -> dict[str, Any]:
    """How the set is read, but for its format."""
    return {own: options.read_as.get(own) for own in READ_AS if own != "format"}


def _folder(workspace: Workspace, data: DataSet) -> Path:
    """The folder of a try's plan and page."""
    return workspace.probes / "report" / f"try-{workspace.cache_folder(data.name, data.root).name}"


# ---- the plan --------------------------------------------------------------------------------------------------------


def _asked(options: TryOptions, checked: DataCheck) -> str:
    """What decides a plan, as text: of the set, what its labels serve."""
    given = {name: value for name, value in options.read_as.items() if value is not None}
    own = asdict(replace(options, minutes=float(options.minutes), device=None, quiet=False, read_as=given))
    return json.dumps([checked.serves, own], sort_keys=True)


def _kept(folder: Path, asked: str) -> Outline | None:
    """The plan that the same command settled before; None where there is none that can be used."""
    try:
        outline = made(Outline, read_json(below(folder, PLAN, "A try"), LARGEST_PLAN), PLAN)
        _ = outline.kind, outline.choice
    except (FeatprobeError, FileKindError, OSError, ValueError):
        return None
    return outline if outline.asked == asked else None


def _shares_left(
    workspace: Workspace, data: DataSet, outline: Outline, specs: Mapping[str, BackboneSpec]
) -> dict[str, float]:
    """The share of each extraction that is missing yet, by the name of its backbone."""
    found = dict.fromkeys(specs, 1.0)
    for path in workspace.cache_folder(data.name, data.root).glob("*.h5"):
        try:
            recipe, states, _ = read_states(path)
        except FeatprobeError:
            continue  # another is made beside it
        same = (recipe.size, recipe.fit, recipe.store) == (outline.size, outline.fit, outline.store)
        for own, spec in specs.items():
            if same and recipe.label == spec.label and not recipe.in_parts:
                found[own] = float((states == MISSING).mean())
    return found


def _outline(
    workspace: Workspace, name: str, data: DataSet, checked: DataCheck, options: TryOptions, skip_bad: bool
) -> Outline:
    """Choose task, head, split and size. A few images are computed, to tell the time."""
    aim = aim_at(checked, data)
    sizes = _sizes(data)
    fit = _fit(sizes)
    store: CacheStore = "pooled" if aim.kind.pooled else "maps"
    candidates = [parse_size(options.size)] if options.size else candidates_of(sizes)
    how = replace(_of(workspace, name, options, skip_bad), fit=fit, batch_size=TIMED_IMAGES, store=store, quiet=True)
    fixed, rates, most_bytes = _timed(workspace, name, options.backbones, candidates, how)
    room = min(free_disk(workspace.cache) / DISK_SHARE, available_memory() / MEMORY_SHARE) / len(rates)
    most_pixels = room / most_bytes

    def at(size: Size) -> Outline:
        return Outline(
            asked=_asked(options, checked),
            task=aim.kind.task,
            head=aim.kind.name,
            labels=aim.labels,
            split=aim.split,
            size=size,
            fit=fit,
            store=store,
            batch_size=max(1, min(MOST_IMAGES, BATCH_PIXELS // math.prod(size))),
            each={own: fixed + rate * math.prod(size) for own, rate in rates.items()},
            reasons=aim.reasons,
        )

    outlines = [at(size) for size in candidates]
    fitting = (own for own in outlines if own.seconds() <= 60 * options.minutes * SPARE)
    chosen = next((own for own in fitting if math.prod(own.size) <= most_pixels), outlines[-1])
    larger = outlines[max(0, outlines.index(chosen) - 1)]
    why = _why_size(chosen, larger, sizes, most_pixels, options)
    return replace(chosen, reasons=(*aim.reasons, why, *_cells(checked, chosen.size, fit)))


def _timed(
    workspace: Workspace, name: str, backbones: Sequence[str], candidates: Sequence[Size], how: ExtractOptions
) -> tuple[float, dict[str, float], float]:
    """How long extraction takes: seconds whatever the size, mostly of decoding, and of each backbone, per pixel.

    And the bytes of features per pixel, of the backbone that has most. A few images are computed at one of the
    candidates, and, under the first backbone, at the smallest, too.
    """

    def cost(backbone: str, size: Size) -> Plan:
        return plan(workspace, backbone_of(workspace, backbone), name, replace(how, size=size))

    timed, least = next((c for c in candidates if math.prod(c) <= TIMED_PIXELS), candidates[-1]), candidates[-1]
    pixels, fewest, fixed = math.prod(timed), math.prod(least), 0.0
    found = {own: cost(own, timed) for own in backbones}
    if fewest < pixels:
        own, small = found[backbones[0]].extract_seconds, cost(backbones[0], least).extract_seconds
        fixed = max(0.0, small - max(0.0, own - small) / (pixels - fewest) * fewest)
    rates = {own: max(0.0, one.extract_seconds - fixed) / pixels for own, one in found.items()}
    return fixed, rates, max(one.feature_bytes for one in found.values()) / pixels


def _sizes(data: DataSet) -> list[Size]:
    """(height, width) of every image that can be read."""

    def size_of(path: Path) -> Size | None:
        try:
            return header_of(path).size
        except DataError:
            return None  # the check lists it

    with in_threads(size_of, [sample.image for sample in data.samples], 2) as found:
        return [size for size in found if size]


def _fit(sizes: Sequence[Size]) -> Fit:
    """How images meet one size: stretched, or with their shapes where these differ."""
    shapes = [width / height for height, width in sizes]
    return "letterbox" if max(shapes) > UNEVEN * min(shapes) else "resize"


def candidates_of(sizes: Sequence[Size]) -> list[Size]:
    """The sizes, (height, width), that images of these sizes can be tried at, from their median down.

    >>> candidates_of([(100, 300), (100, 300)])
    [(100, 300), (64, 224), (64, 160), (64, 128), (64, 64)]
    """
    own = (round(statistics.median(h for h, _ in sizes)), round(statistics.median(w for _, w in sizes)))
    scaled = [tuple(max(LEAST, STEP * round(scale * side / STEP)) for side in own) for scale in SCALES[1:]]
    smaller = [(height, width) for height, width in scaled if height * width < math.prod(own)]
    return list(dict.fromkeys([own, *smaller]))


def _why_size(chosen: Outline, larger: Outline, sizes: Sequence[Size], most_pixels: float, options: TryOptions) -> str:
    """Why images are brought to the chosen size. larger: the next larger one; the same where there is none."""
    if options.size:
        return f"{_text(chosen.size)} pixels, as you said"
    own = candidates_of(sizes)[0]
    if chosen == larger:
        same = "the size of all images" if len(set(sizes)) == 1 else "the median size of the images"
        return f"{_text(chosen.size)} pixels is {same}"
    said = f"{_text(chosen.size)} pixels, where the median image has {_text(own)}: {_text(larger.size)}"
    if math.prod(larger.size) > most_pixels:
        return f"{said} would be more than the disk and the memory hold"
    limit = f"--minutes {options.minutes:g} allows (half of it is kept for a busier machine)"
    return f"{said} would take about {time_text(larger.seconds())}, more than {limit}"


def _cells(checked: DataCheck, size: Size, fit: Fit) -> list[str]:
    """How large defects are at this size."""
    objects = checked.objects
    if objects is None or not objects.count or fit != "resize":
        return []
    side = objects.median * math.sqrt(math.prod(size) / math.prod(objects.frame))
    return [f"at that size half of the {counted(objects.count, 'defect')} measure less than {side:.0f} pixels"]


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _plan_lines(outline: Outline, options: TryOptions, checked: DataCheck, folder: Path, left: float) -> list[str]:
    """The plan and its minutes, for people."""
    aim = f"{outline.task}, head {outline.head}"
    solved = outline.kind.solved
    rest = "" if solved else ", and the training, whose time is known after it"
    names = " and ".join(f"{own} ({minutes_text(seconds)})" for own, seconds in outline.each.items())
    over = outline.seconds() > 60 * options.minutes
    begun = f" of {minutes_text(outline.seconds())}, since a part is there already" if left < outline.seconds() else ""
    return [
        f"Plan: {minutes_text(left)}{begun}{rest}",
        f"  images     {counted(checked.images, 'image')}, each brought to {_text(outline.size)} ({outline.fit})",
        f"  learn      {aim}; {outline.choice.text}",
        f"  backbones  {names}",
        f"  page       {folder / 'index.html'}",
        *(f"  because    {reason}" for reason in outline.reasons),
        *(
            [
                f"  note       about {time_text(outline.seconds())} is more than the {options.minutes:g} min of "
                "--minutes, at the smallest size"
            ]
            if over
            else []
        ),
    ]


# ---- the work --------------------------------------------------------------------------------------------------------


def _of(workspace: Workspace, name: str, options: TryOptions, skip_bad: bool) -> ExtractOptions:
    """The options that all extractions of a try have: of whole images, whatever featprobe.toml says."""
    told = workspace.data_options(name)
    idle: dict[str, Any] = {own: value for own, value in (("tile", 0), ("views", ())) if own in told}
    return ExtractOptions(device=options.device, quiet=options.quiet, skip_bad=skip_bad, **idle, **options.read_as)


def _extraction(
    workspace: Workspace, name: str, outline: Outline, options: TryOptions, skip_bad: bool
) -> ExtractOptions:
    settled = {own: getattr(outline, own) for own in ("size", "fit", "store", "batch_size")}
    return replace(_of(workspace, name, options, skip_bad), **settled)


def _trainings(workspace: Workspace, cache: Cache, outline: Outline, options: TryOptions) -> list[Training]:
    """The trainings of one seed on a cache, one of each fold."""
    own = ProbeOptions(
        head=outline.head, seeds=1, split=outline.split, labels=outline.labels, device=options.device,
        quiet=options.quiet, show=SHOWN,
    )  # fmt: skip
    how = with_defaults(outline.task, own)
    splits = single_splits(outline.choice)
    return [Training(workspace, Partition(cache, split), outline.task, how, (0,)) for split in splits]


def _train(trainings: Sequence[Training], say: Say, agree: Callable[[float], bool], left: float) -> bool:
    """Train what is not there yet; False where that would take longer than what is left, and the user says no."""
    due = [training for training in trainings if not training.is_done()]
    known = foreseen_each(due)
    agenda = Agenda.of_trainings(due, known, say)
    if known:
        agenda.announce()
        seconds, _ = agenda.left()
        if seconds > left and not agree(seconds):
            return False
    for training in due:
        agenda.begin(training.label)
        finished = run(training, forecast=known.get(alike(training)))
        if training.choice.fold <= 1:  # a sheet of the first fold shows enough
            show(finished, SHOWN, [], [])
        del finished  # the next training needs its memory
        agenda.end()
    return True


def further(workspace: Workspace, data: DataSet, outline: Outline, options: TryOptions) -> tuple[tuple[str, str], ...]:
    """Commands that go on from a try, each after what it is for."""
    name = workspace.data_argument(data.name, data.root)
    words = ["--data", name]
    own = ["--split", outline.split] if outline.split != "own" else []
    own += ["--labels", outline.labels] if outline.labels != "own" else []
    task = ["--task", outline.task]
    found = [("what spoils a study here, on a page", ["data", "check", name, "--html", "check.html"])]
    others = [kind for kind in kinds_of(outline.task) if kind != outline.head]
    if others and outline.store == "maps":
        found.append((f"another head: {', '.join(others)}", ["probe", *task, "--head", others[0], *words, *own]))
    live = [kind for kind in kinds_of(outline.task) if kind_of(outline.task, kind).live]
    if live:
        first = ["finetune", *task, "--head", live[0], *words, *own, "--backbone", options.backbones[0], "--dry-run"]
        found.append(("is it enough to freeze the backbone? (it first says how long)", first))
    objects = next((other for other in data.serves if SCORES[other].objects and other != outline.task), None)
    if objects:
        said = f"find objects: {kinds_of(objects)[0]} is trained, and first says how long"
        called = ["probe", "--task", objects, *words, "--backbone", ",".join(options.backbones), "--extract"]
        found.append((said, [*called, "--split", outline.choice.by]))
    found.append(("a study of your own, as a file with comments", ["init", name]))
    return tuple((what, shlex.join(["featprobe", *own_words])) for what, own_words in found)
