"""When a POD curve holds, after MIL-HDBK-1823A: conditions that the data show, and conditions that they can't show."""

CHECKED = (
    "There are enough targets: 60 for hit/miss, 40 for signal response.",
    "Hits and misses overlap in size, and large targets are found more often than small ones.",
    "The curve fits: targets of all sizes are found as often as it says (a p-value below 0.05 says that it does not).",
    "a90 lies within the sizes of the targets.",
    "Targets of one part resemble each other: the part (or the image) is a cluster, and bounds are wider for it.",
)
"""What featprobe checks. A curve is refused, or a note stands beside it, where one fails."""
UNCHECKED = (
    "The targets stand for the defects in service: in kind, place and orientation, not in size alone.",
    "The labels are right: each defect is marked, and its marked size is its true size.",
    "Each defect is seen once. Several shots of one defect are one observation: give them one group.",
    "Source, detector and exposure are those of production, and are calibrated.",
    "People act on every call. A call that a person overrules finds nothing.",
    "The threshold was fixed before these images were seen, and nothing was tuned on them.",
)
"""What the data can't show, and whoever signs the qualification answers for."""
