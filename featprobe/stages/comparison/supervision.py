"""How far heads that saw good images alone stand behind heads that saw labels, on the same test units.

A good part is easy to come by and a labelled defect is not, so what labels would bring is asked before they are made.
Both heads are scored by the AUROC of defect against good units, which needs no threshold.
"""

from collections.abc import Sequence
from typing import Any

from featprobe.kinds import FROZEN
from featprobe.metrics import paired_difference
from featprobe.specs import digest
from featprobe.stages.comparison.differences import Line, Table
from featprobe.stages.comparison.results import Result
from featprobe.stages.comparison.tested import AnomalyTest, ImageTest


def behind_supervised(tables: Sequence[Table]) -> list[Line]:
    """The lead of the best supervised over the best anomaly head of each backbone, where both have the same test units.

    The best on validation of those that stand for a backbone, of frozen ones where there are any, as anomaly heads are
    frozen; on the largest share of training images that both have.
    Units, groups, labels and the name of the split agree; where they do not there is no line. Differences are paired,
    of these trained heads.
    """
    found: dict[tuple[Any, ...], dict[type, Result]] = {}
    every = [result for table in tables for result in table.chosen]
    for result in sorted(every, key=lambda own: (own.row.fraction, own.row.regime == FROZEN, own.validation)):
        kind = type(result.runs[0].test)
        if key := _test_of(result):
            found.setdefault((result.backbone, result.row.fraction, key), {})[kind] = result  # the best comes last
    names = {result.backbone: table.names[result.backbone] for table in tables for result in table.results}
    largest: dict[tuple[Any, ...], Line] = {}
    for (backbone, _, key), of_kind in found.items():
        if len(of_kind) == 2:
            largest[backbone, key] = _line(of_kind[ImageTest], of_kind[AnomalyTest], names[backbone])
    return list(largest.values())


def _test_of(result: Result) -> str | None:
    """The same for results with the same test units, of which it is known alike whether they are good; None for
    results of which that is no question."""
    goods = [_goods(run.test) for run in result.runs]
    if any(own is None or own != goods[0] for own in goods):
        return None
    return digest([result.row.data_fingerprint, result.row.choice.key, result.runs[0].tested, goods[0]])


def _goods(test: Any) -> list[tuple[str, bool]] | None:
    """Each unit's identifier and whether it is good, sorted; None for a head whose AUROC is of something else."""
    match test:
        case AnomalyTest(found):
            return sorted(zip(found.ids, found.good.tolist(), strict=True))
        case ImageTest(images) if images.good is not None and images.truth.shape[1] == 2:
            return sorted(zip(images.ids, (images.truth[:, images.good] > 0).tolist(), strict=True))
    return None


def _line(supervised: Result, anomaly: Result, backbone: str) -> Line:
    one, other = (own.score(own.main) for own in (supervised, anomaly))
    lead = paired_difference(one, other, resamples=anomaly.row.scores.resamples)
    low, high = (lead.low, lead.high) if lead.has_interval else (float("nan"), float("nan"))
    row = supervised.row
    return {
        "data": row.data,
        "split": row.split,
        "backbone": backbone,
        "fraction": row.fraction,
        "score": anomaly.main,
        "anomaly_head": anomaly.row.head,
        "supervised_head": row.head,
        "supervised_regime": supervised.variant,
        "behind": lead.estimate,
        "low": low,
        "high": high,
        "groups": lead.groups,
        "anomaly_seeds": len(anomaly.runs),
        "supervised_seeds": len(supervised.runs),
    }
