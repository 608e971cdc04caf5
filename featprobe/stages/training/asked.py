"""What is asked of `probe` and `finetune`: options, and the caches that they mean. Nothing here imports torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from featprobe.cache import Cache, open_cache
from featprobe.errors import (
    CacheError,
    CacheIncompleteError,
    FeatprobeError,
    NoMapsError,
    ProbeError,
    UsageError,
    as_usage,
    nearest,
)
from featprobe.kinds import NOT_TRAINED, TASKS, HeadKind, TrainRecipe, grid_of, kind_of, kinds_of, loaded_kinds
from featprobe.levels import pick_levels
from featprobe.result_rows import ResultRow
from featprobe.scores import SCORES
from featprobe.stages.partition import single_splits
from featprobe.stages.training.logs import check_logs
from featprobe.stages.training.probe_options import SETTINGS, ProbeOptions, settings_of
from featprobe.stages.workspace import Workspace, backbone_of, caches_of

LET_IT = "Or let this command make it first:"
MASKS = next(task for task, scores in SCORES.items() if scores.dense)  # a task that every set with masks serves
DENSE_ONLY = ("loss", "loss_at", "class_weights")
MOST_SEEDS = 10_000
FREE = ("tuning", "device", "show", "quiet", "lr", "weight_decay", "log", "budget", "verify")
"""Options that a counterpart does not take from its frozen result."""


def check_asked(
    workspace: Workspace,
    task: str | None,
    data: Sequence[str],
    backbones: Sequence[str],
    options: ProbeOptions,
    *,
    extract: bool = False,
) -> None:
    """Refuse what can't be done, of what a command line asks for, in a fraction of the time that torch takes to load.

    Raises UsageError for values that are wrong whatever the workspace holds, names that nothing has among them;
    FeatprobeError, as `find_caches` does, for caches that are not there. task: None for the default one, and for
    counterparts of frozen results where no data set and no backbone is named either. extract: what is missing is made.
    """
    live = options.tuning is not None
    check_logs(options.log)
    if live and not (task or data or backbones):
        with as_usage():
            return check_free(options)
    task = task or TASKS[0]
    with as_usage():
        options = (checked_live if live else checked)(task, options)
        single_splits(options.choice)  # reads a split file
    _check_names(workspace, data, backbones, extract)
    if not extract:
        caches, _ = find_caches(
            workspace, task, data, backbones, options.instances, pooled=live or reads_pooled(options), live=live
        )
        for cache in caches:
            with as_usage():
                pick_levels(cache.levels, options.levels)


def _check_names(workspace: Workspace, data: Sequence[str], backbones: Sequence[str], extract: bool) -> None:
    """Raise UsageError for a name that no cache has, and that is no other name of a data set or a backbone either."""
    found, broken = _opened(workspace)
    if broken:
        return  # whose names are not known
    labels = {cache.recipe.label for cache in found}
    sets = {name: partial(workspace.check_set, name) for name in data if not caches_of(workspace, found, name)}
    networks = {name: partial(backbone_of, workspace, name) for name in backbones if name not in labels}
    no_set, no_network = ({n: said for n, own in side.items() if (said := refusal(own))} for side in (sets, networks))
    if extract and (no_set or no_network):
        raise UsageError(next(iter((no_set | no_network).values())))
    sets_known = {cache.data.name for cache in found}.union(workspace.data_names())
    networks_known = labels.union(workspace.backbone_names())
    if lack := _lack(workspace, ([*no_set], sets_known, "data set"), ([*no_network], networks_known, "backbone")):
        raise UsageError(str(lack))


def refusal(check: Callable[[], object]) -> str:
    """The text of the error that a check raises; "" where it raises none."""
    try:
        check()
    except FeatprobeError as error:
        return str(error)
    return ""


def checked(task: str, options: ProbeOptions) -> ProbeOptions:
    """The options with their defaults filled in; raises ProbeError for what can't be."""
    head = options.head or kinds_of(task)[0]
    kind = kind_of(task, head)
    recipe = options.recipe or kind.recipe
    if kind.is_solved(options.regime):
        solved = f"{head} is solved, not trained"
        if options.lr or options.weight_decay:
            raise ProbeError(f"{solved}: it has no --lr and no --weight-decay to try.")
        if options.budget == "auto":
            raise ProbeError(f"{solved}: it has no iterations to look for. Omit --iterations auto.")
        recipe = replace(recipe, **NOT_TRAINED)
    _check_meaning(kind, options, recipe)
    grid_of(recipe, options.lr, options.weight_decay)  # refuses rates that make no sense
    if options.seeds is not None and not 1 <= options.seeds <= MOST_SEEDS:
        raise ProbeError(f"{options.seeds} seeds can't be trained. wanted: --seeds from 1 to {MOST_SEEDS}.")
    wrong = [f for f in options.fractions if not 0 < f <= 1]
    if wrong or not options.fractions:
        raise ProbeError(f"{wrong or 'nothing'} is not a fraction of the training split. wanted: 0 < F <= 1.")
    return replace(options, head=head, kind=kind, recipe=recipe)


def checked_live(task: str, options: ProbeOptions) -> ProbeOptions:
    """The options with their defaults filled in; raises ProbeError for what can't be fine-tuned."""
    options = checked(task, options)
    if options.is_solved:
        raise ProbeError(f"{options.head} is solved on frozen features: nothing of it can be fine-tuned.")
    if options.shared_order:
        raise ProbeError("Seeds share no pass where each has a backbone of its own. Omit --shared-order.")
    return options


def check_free(options: ProbeOptions) -> None:
    """Raise ProbeError for options that counterparts of frozen results take from these."""
    plain = ProbeOptions()
    given = [n for n in plain.__dataclass_fields__ if n not in FREE and getattr(options, n) != getattr(plain, n)]
    if given:
        raise ProbeError(
            f"A counterpart takes {', '.join(given)} from its frozen result. Omit it, or name what to train:\n"
            "  featprobe finetune --task TASK --data NAME …"
        )


def _check_meaning(kind: HeadKind, options: ProbeOptions, recipe: TrainRecipe) -> None:
    """Raise ProbeError for an option that the head would not look at."""
    scores, solved, plain = SCORES[kind.task], kind.is_solved(options.regime), ProbeOptions()
    is_dense, on_images = scores.dense, scores.on in ("images", "anomalies")
    dense = {f"--{n.replace('_', '-')}": getattr(recipe, n) != getattr(kind.recipe, n) for n in DENSE_ONLY}
    idle = {
        "--width": options.width is not None and not kind.width,
        "--pyramid": options.pyramid != "auto" and not kind.pyramid,
        "--log": bool(options.log) and solved,
        "--instances": options.instances != "own" and not scores.objects,
        **{name: given and not is_dense for name, given in dense.items()},
        **{name: dense[name] and solved for name in ("--loss", "--loss-at") if is_dense},
        "--absent-classes": options.absent != "ignore" and on_images,
        **{
            f"--{name.replace('_', '-')}": getattr(options, name) != getattr(plain, name)
            for name in SETTINGS
            if name not in settings_of(kind)
        },
    }
    given = [name for name, is_idle in idle.items() if is_idle]
    if given:
        raise ProbeError(f"{', '.join(given)} would change nothing for {kind.task} with the head {kind.name}. Omit it.")


def labels_for(task: str, options: ProbeOptions) -> str:
    """The task whose labels a data set must hold to serve a task."""
    return MASKS if options.instances == "components" else task


def reads_pooled(options: ProbeOptions) -> bool:
    """Whether caches of pooled features serve the head, too."""
    return options.kind is not None and options.kind.pooled


def find_caches(
    workspace: Workspace,
    task: str,
    data: Sequence[str],
    backbones: Sequence[str],
    instances: str = "own",
    *,
    pooled: bool = False,
    live: bool = False,
) -> tuple[list[Cache], list[str]]:
    """Complete caches that serve a task, and notes on those left aside.

    live: whether a backbone is to be trained, too, so that errors advise what can be. pooled: whether caches of
    pooled features serve, too; of those, a cache of the same maps is taken instead where it is here. Raises
    CacheError for one where maps are wanted and no other cache has them; CacheIncompleteError where a data set, a
    backbone, or, where both are named, a pair of them has no complete cache, or where none is named and none is
    complete; ProbeError when all that was asked for falls away.
    """
    found, broken = _opened(workspace)
    own = {name: {cache.path for cache in caches_of(workspace, found, name)} for name in data}
    sets = {cache.data.name for cache in found} | {name for name in data if own[name]}
    lacks = _lack(workspace, (data, sets, "data set"), (backbones, {c.recipe.label for c in found}, "backbone"))
    if lacks:
        raise broken[0] if broken else lacks

    def is_asked_for(cache: Cache) -> bool:
        by_data = not data or any(cache.path in paths for paths in own.values())
        return by_data and (not backbones or cache.recipe.label in backbones)

    asked_for = [cache for cache in found if is_asked_for(cache)]
    if not asked_for and broken:
        raise broken[0]
    if not asked_for:
        raise CacheError(
            f"There is no feature cache in {workspace.cache} to probe.\n"
            "Make one:  featprobe extract --backbone embedded --data xray\n"
            f"{LET_IT}  --extract --backbone embedded --data xray"
        )
    served = {MASKS} if instances == "components" else {task}
    able = [cache for cache in asked_for if served & set(cache.data.serves)]
    if not able:
        raise _unserved(asked_for, task, live)
    notes = [f"{c.path} holds no labels for {task}" for c in asked_for if c not in able]
    notes += [f"left aside: {' '.join(str(error).splitlines())}" for error in broken]
    complete, lacking = list[Cache](), list[tuple[Cache, CacheError]]()
    for cache in able:
        try:
            _check_usable(cache, task, pooled)
            complete.append(cache)
        except (CacheIncompleteError, NoMapsError) as error:
            lacking.append((cache, error))

    def named(cache: Cache) -> tuple[str, str]:
        return cache.data.name if data else "", cache.recipe.label if backbones else ""

    served_by = {named(cache) for cache in complete}
    for cache, lack in lacking:
        if named(cache) not in served_by:
            raise type(lack)(f"{lack}\n{LET_IT}  --extract") from lack
        no_maps = f"left aside: {cache.path.name} holds pooled features alone, and this head reads maps"
        notes.append(no_maps if isinstance(lack, NoMapsError) else left_aside(lack))
    return _without_twins(complete, notes), notes


def _opened(workspace: Workspace) -> tuple[list[Cache], list[CacheError]]:
    """The caches here, and the errors of those that can't be opened."""
    found, broken = list[Cache](), list[CacheError]()
    for path in workspace.cache_files():
        try:
            found.append(open_cache(path))
        except CacheError as error:
            broken.append(error)
    return found, broken


def _lack(workspace: Workspace, *sides: tuple[Sequence[str], set[str], str]) -> CacheError | None:
    """The error for the first name that no cache has; None where all are known. sides: names, those known, of what."""
    for asked, known, what in sides:
        for name in asked:
            if name not in known:
                return CacheError(
                    f"There is no cache of the {what} {name!r} in {workspace.cache}. {nearest(name, known)}\n"
                    f"Make one:  featprobe extract --backbone NAME --data NAME\n{LET_IT}  --extract"
                )
    return None


def _check_usable(cache: Cache, task: str, pooled: bool) -> None:
    """Raise CacheIncompleteError where rows are missing, NoMapsError where maps are wanted that it does not hold."""
    if not pooled and cache.recipe.store == "pooled":
        able = [kind.name for kind in loaded_kinds(task) if kind.pooled]
        other = f"\nOr take a head that reads pooled features:  --head {' | '.join(able)}" if able else ""
        raise NoMapsError(f"{cache.lacks_maps()}{other}")
    cache.usable()


def _without_twins(caches: Sequence[Cache], notes: list[str]) -> list[Cache]:
    """The caches less those of pooled features whose maps are here as well."""
    keys = {(cache.recipe.key, cache.data.fingerprint) for cache in caches}
    twins = [
        cache
        for cache in caches
        if cache.recipe.store == "pooled" and (replace(cache.recipe, store="maps").key, cache.data.fingerprint) in keys
    ]
    notes += [f"left aside: {cache.path.name} holds pooled features, and its maps are here, too" for cache in twins]
    return [cache for cache in caches if cache not in twins]


def _unserved(caches: Sequence[Cache], task: str, live: bool) -> ProbeError:
    """The error that caches hold no labels for a task, with the tasks that they do hold labels for."""
    each = dict.fromkeys(f"{c.data.name}: {', '.join(c.data.tasks or c.data.serves) or 'none'}" for c in caches)
    command = f"featprobe {'finetune' if live else 'probe'}"
    serves = dict.fromkeys(other for cache in caches for other in cache.data.serves)
    others = [own for own in serves if not live or any(kind.live for kind in loaded_kinds(own))]
    advice = f"Take a task that they serve:  {command} --task {' | '.join(others)}" if others else ""
    if any(cache.data.tasks for cache in caches):
        advice = f"If there are only masks of classes, use their connected parts:\n  {command} … --instances components"
    return ProbeError(
        f"No cache here can serve the task {task}.\n  wanted  labels for {task}\n"
        f"  found   {'; '.join(list(each)[:5])}\n"
        "semseg and instseg need masks in the data set's files, detect needs boxes or objects with masks, classify and "
        f"anomaly need labels of images or any of these. {advice}"
    )


def left_aside(error: CacheError) -> str:
    """A note on a cache that is passed over: what it lacks, and what to do."""
    return f"left aside: {' '.join(str(error).splitlines())}"


def caches_by_key(workspace: Workspace) -> dict[tuple[str, str], Cache]:
    """The caches that can be opened, by the key of their features and the fingerprint of their data."""
    return {(cache.recipe.key, cache.data.fingerprint): cache for cache in _opened(workspace)[0]}


def no_cache(workspace: Workspace) -> str:
    """Why the cache of a row is not among `caches_by_key`: it is gone, or is one of those that can't be opened."""
    _, broken = _opened(workspace)
    why = f", or is one that can't be opened ({str(broken[0]).splitlines()[0].rstrip('.')})" if broken else ""
    return f"its cache is not here any more{why}"


def as_trained(row: ResultRow, card: Mapping[str, Any], options: ProbeOptions) -> ProbeOptions:
    """Options that mean the head of a row and the data that it was trained on. card: of that head.

    options: what a row does not decide: regime, device, and what is shown.
    """
    head = card["head"]
    return replace(
        options,
        head=row.head,
        kind=row.kind,
        levels=tuple(head["levels"]),
        width=head["width"],
        pyramid=head["pyramid"],
        recipe=row.recipe,
        budget="fixed",
        split=str(row.choice),
        instances=row.instances,
        absent=row.absent_classes,
        fractions=(row.fraction,),
        **(row.settings.options() if row.settings else {}),
    )
