"""Judge what nodes have measured: what is wrong with which node, and which of them to take. Pure.

`node_agent.py` measures each node, `megatron_solar/node_checks.py` the ranks of all of them together. A
finding excludes a node, or only puts it behind the others: a slow one is better than none.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from orchestrator.settings import ClusterSettings, NodeCheckSettings

SLOW = 0.9
"""A node below this share of the median of all is slow."""


class Bound(StrEnum):
    """What a check's limit is."""

    AT_LEAST = "at least"
    AT_MOST = "at most"
    SHARE_OF_MEDIAN = "of the median of all nodes"
    NONE = "it passes or fails"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """A check: its limit, and what to do about a node that is beyond it."""

    name: str
    remedy: str
    bound: Bound = Bound.NONE
    limit: float = 0.0
    """Of the unit; of the median a share."""
    unit: str = ""
    gpu_only: bool = False
    """Not judged on the CPU, unless settings have a limit for it."""
    excludes: bool = True
    """Whether a node that fails it is not taken at all."""


def _gpu(name: str, bound: Bound, limit: float, unit: str, remedy: str) -> NodeCheck:
    excludes = bound != Bound.SHARE_OF_MEDIAN
    return NodeCheck(
        name=name, bound=bound, limit=limit, unit=unit, remedy=remedy, gpu_only=True, excludes=excludes
    )  # fmt: skip


_AT_LEAST, _AT_MOST, _SHARE = Bound.AT_LEAST, Bound.AT_MOST, Bound.SHARE_OF_MEDIAN
_RESET = "drain the node and have its GPUs reset"
CHECKS: Mapping[str, NodeCheck] = {
    check.name: check
    for check in (
        NodeCheck(name="reachable", remedy="see whether the node is up and reaches the first node over TCP"),
        _gpu("gpu_count", _AT_LEAST, 1, "GPUs", "drain the node: a GPU is missing; or ask for fewer ranks a node"),
        _gpu("gpu_memory", _AT_MOST, 1024, "MiB in use", "end what another job has left on the node's GPUs"),
        _gpu("gpu_clock", _SHARE, SLOW, "MHz", "see `nvidia-smi -q -d CLOCK` there for locked clocks"),
        _gpu("gpu_throttled", _AT_MOST, 0, "GPUs slowed by hardware or heat", "have its cooling and power looked at"),
        _gpu("ecc_errors", _AT_MOST, 0, "memory errors that could not be corrected", _RESET),
        _gpu("row_remap", _AT_MOST, 0, "GPUs with rows to remap", _RESET),
        _gpu("xid", _AT_MOST, 0, "hardware errors in a day", f"{_RESET}; NVIDIA's list of Xid errors says what it was"),
        NodeCheck(
            name="infiniband", bound=_SHARE, limit=0.99, unit="Gb/s in active ports",
            remedy="see `ibstat` there: a port is down or has a lower rate than on the other nodes",
        ),
        NodeCheck(name="temporary_disk", bound=_AT_LEAST, limit=1.0, unit="GB free", remedy="make room in its /tmp"),
        NodeCheck(
            name="shared_memory", bound=_AT_LEAST, limit=0.05, unit="GB free",
            remedy="remove what dead jobs have left in its /dev/shm, or give the container more of it",
        ),
        NodeCheck(
            name="run_disk", bound=_AT_LEAST, limit=1.0, unit="GB free", remedy="make room where the run's folder lies"
        ),
        NodeCheck(
            name="run_folder", remedy="mount the same shared file system there, writable; or set paths.runs to one"
        ),
        NodeCheck(
            name="clock_skew", bound=_AT_MOST, limit=5.0, unit="s beside the first node",
            remedy="see its chrony or ntpd",
        ),
        NodeCheck(name="ranks", remedy="see the logs of the node checks of its ranks"),
        NodeCheck(name="matrix_product", remedy="drain the node: it computes wrongly"),
        _gpu("matrix_speed", _SHARE, SLOW, "TFLOP/s", "look for locked clocks, heat or another job on it"),
        NodeCheck(name="all_reduce_in_node", remedy="see NVLink and NCCL's messages in the logs of its ranks"),
        _gpu("speed_in_node", _SHARE, SLOW, "GB/s", "see `nvidia-smi nvlink -s` there"),
        NodeCheck(name="all_reduce_in_pairs", remedy="see its network: ports, cables, NCCL_SOCKET_IFNAME, NCCL_IB_HCA"),
        NodeCheck(
            name="speed_in_pairs", remedy="see its network's ports and cables", bound=_SHARE, limit=0.7, unit="GB/s",
            gpu_only=True, excludes=False,
        ),
    )
}  # fmt: skip
_OWN_REMEDY = "a check of this site's own, cluster.checks.own.{name}, says so"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """What came of one check on one node."""

    value: float = 0.0
    detail: str = ""
    skipped: str = ""
    """Why it does not apply there."""
    error: str = ""
    """Why it failed, whatever the limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What one node has told so far."""

    node: str
    measures: Mapping[str, Measure]
    is_complete: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong with a node."""

    node: str
    check: str
    message: str
    remedy: str
    excludes: bool = True

    def __str__(self) -> str:
        """Return it as one sentence."""
        return f"{self.node}: {self.check}: {self.message}; {self.remedy}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which nodes to start on."""

    nodes: tuple[str, ...]
    """In the order of the allocation."""
    spares: tuple[str, ...]
    dropped: Mapping[str, str]
    """Node -> why it is not taken."""
    doubtful: Mapping[str, str]
    """Node -> what is wrong with it, though it is taken or a spare."""
    missing: int
    """How many nodes there are too few."""


def unknown_names(settings: NodeCheckSettings) -> list[str]:
    """Return what is wrong with the names that settings give checks: unknown ones, or a site's own that are taken."""
    known = [*CHECKS, *settings.own]
    problems = [
        f"cluster.checks.{field}: there is no check {name}; known are {', '.join(known)}"
        for field, names in (("without", settings.without), ("limits", settings.limits))
        for name in names
        if name not in known
    ]
    problems += [
        f"cluster.checks.own.{name}: a standard check has that name" for name in settings.own if name in CHECKS
    ]
    return problems


def judge(nodes: Sequence[str], reports: Mapping[str, NodeReport], cluster: ClusterSettings) -> list[Finding]:
    """Return what is wrong with each node by itself or beside the others.

    Args:
        nodes: every node of the allocation that should have answered.
    """
    findings = []
    for node in nodes:
        report = reports.get(node)
        if report is None:
            findings.append(_finding(node, "reachable", "has not answered"))
            continue
        if not report.is_complete:
            known = ", ".join(report.measures) or "none"
            findings.append(_finding(node, "reachable", f"has not ended its checks; it has told of {known}"))
        findings += [
            _finding(node, name, _told(measure.error, measure.detail))
            for name, measure in report.measures.items()
            if measure.error
        ]
    names = dict.fromkeys(name for report in reports.values() for name in report.measures)
    for name in names:
        measures = {node: reports[node].measures.get(name) for node in nodes if node in reports}
        values = {n: m for n, m in measures.items() if m is not None and not m.error and not m.skipped}
        findings += judge_values(
            name, {n: m.value for n, m in values.items()}, cluster, {n: m.detail for n, m in values.items()}
        )
    return [finding for finding in findings if finding.check not in cluster.checks.without]


def judge_values(
    name: str, values: Mapping[str, float], cluster: ClusterSettings, details: Mapping[str, str]
) -> list[Finding]:
    """Return the nodes beyond a check's limit."""
    check = CHECKS.get(name)
    if check is None or check.bound == Bound.NONE or not values:
        return []
    if check.gpu_only and cluster.device == "cpu" and name not in cluster.checks.limits:
        return []  # a CPU's speed says something only where nothing else runs on it, as who sets a limit knows
    limit = cluster.checks.limits.get(name, cluster.ranks_per_node if name == "gpu_count" else check.limit)
    median = statistics.median(values.values())
    lowest = {Bound.AT_LEAST: limit, Bound.SHARE_OF_MEDIAN: limit * median}.get(check.bound)
    wanted = (
        f"{check.bound} {limit:g}" if check.bound != Bound.SHARE_OF_MEDIAN else f"at least {limit:.0%} {check.bound}"
    )
    if check.bound == Bound.SHARE_OF_MEDIAN:
        wanted += f", {median:.4g}"
    return [
        _finding(node, name, _told(f"{value:.4g} {check.unit}, should be {wanted}", details.get(node, "")))
        for node, value in values.items()
        if (value < lowest if lowest is not None else value > limit)
    ]


def choose_nodes(order: Sequence[str], findings: Iterable[Finding], wanted: int) -> Choice:
    """Take the best `wanted` nodes: sound ones before doubtful ones, both in the allocation's order."""
    by_node: dict[str, list[Finding]] = {}
    for finding in findings:
        by_node.setdefault(finding.node, []).append(finding)
    reasons = {node: "; ".join(f"{f.check}: {f.message}" for f in found) for node, found in by_node.items()}
    excluded = {node for node, found in by_node.items() if any(f.excludes for f in found)}
    usable = [node for node in order if node not in excluded]
    best = sorted(usable, key=lambda node: node in by_node)  # sorting keeps the order among equals
    taken = set(best[:wanted])
    return Choice(
        nodes=tuple(node for node in order if node in taken),
        spares=tuple(best[wanted:]),
        dropped={node: reasons[node] for node in order if node in excluded},
        doubtful={node: reasons[node] for node in usable if node in by_node},
        missing=max(0, wanted - len(usable)),
    )


def _finding(node: str, name: str, message: str) -> Finding:
    check = CHECKS.get(name)
    remedy = check.remedy if check is not None else _OWN_REMEDY.format(name=name)
    return Finding(
        node=node, check=name, message=message, remedy=remedy, excludes=check.excludes if check is not None else True
    )


def _told(message: str, detail: str) -> str:
    return f"{message} ({detail})" if detail else message


# The ranks' checks.


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupResult:
    """An all-reduce as one rank saw it."""

    nodes: tuple[int, ...]
    """Numbers of the nodes in the group: one, or a pair."""
    error: str
    gigabytes_per_second: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What one rank of the node checks wrote."""

    rank: int
    node: int
    host: str
    matrix_error: str
    matrix_tflops: float
    groups: tuple[GroupResult, ...]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairVerdict:
    """Who is to blame for all-reduces that failed between pairs of nodes."""

    culprits: frozenset[str]
    suspects: frozenset[str]
    """One of them is to blame, or the link between them, and nothing says which."""
    untested: frozenset[str]
    """Only ever paired with a culprit."""


def name_culprits(passed: Mapping[tuple[str, str], bool]) -> PairVerdict:
    """Say which nodes explain the pairs that failed.

    A node that passed with anybody is sound. A node that failed with a sound one is a culprit. What no
    culprit explains is the fault of the one node that all of it has in common, or of any of them.

    With the two rounds of pairs on n >= 3 nodes a single bad node is always named, and no other is named or
    suspected; where n is odd and it stands beside one of the two ends, that end is untested. Of two nodes
    both are suspects. Of several bad nodes those are named that have a sound partner; where all partners of
    a sound node are bad and no other has a sound one (three nodes, the outer two bad), it is named for them.
    """
    failed = [pair for pair, is_good in passed.items() if not is_good]
    sound = {node for pair, is_good in passed.items() if is_good for node in pair}
    culprits = {node for pair in failed for node in pair if node not in sound and set(pair) & sound}
    suspects: set[str] = set()
    for pairs in _connected([pair for pair in failed if not set(pair) & culprits]):
        common = set.intersection(*map(set, pairs))
        if len(common) == 1:
            culprits |= common
        else:
            suspects |= {node for pair in pairs for node in pair}
    nodes = {node for pair in failed for node in pair}
    return PairVerdict(
        culprits=frozenset(culprits),
        suspects=frozenset(suspects),
        untested=frozenset(nodes - sound - culprits - suspects),
    )


def _connected(pairs: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Return pairs in groups that share nodes."""
    groups: list[list[tuple[str, str]]] = []
    for pair in pairs:
        touching = [group for group in groups if any(set(pair) & set(other) for other in group)]
        groups = [group for group in groups if group not in touching] + [[pair, *(p for g in touching for p in g)]]
    return groups


def judge_ranks(nodes: Sequence[str], records: Sequence[RankRecord], cluster: ClusterSettings) -> list[Finding]:
    """Return what is wrong with nodes by what their ranks found.

    Args:
        nodes: in the order in which their ranks were started.
    """
    by_node = {number: [record for record in records if record.node == number] for number in range(len(nodes))}
    absent = {number for number, found in by_node.items() if len(found) < cluster.ranks_per_node}
    findings = [
        _finding(nodes[n], "ranks", f"{len(by_node[n])} of {cluster.ranks_per_node} ranks ended their checks")
        for n in sorted(absent)
    ]
    for number, node in enumerate(nodes):
        within = [(r, g) for r in by_node[number] for g in r.groups if len(g.nodes) == 1]
        wrong = [f"rank {r.rank}: {r.matrix_error}" for r in by_node[number] if r.matrix_error]
        broken = [f"rank {r.rank}: {g.error}" for r, g in within if g.error]
        findings += [_finding(node, "matrix_product", wrong[0])] if wrong else []
        findings += [_finding(node, "all_reduce_in_node", broken[0])] if broken else []
    whole = {n: found for n, found in by_node.items() if n not in absent}
    speeds = {nodes[n]: min(r.matrix_tflops for r in found) for n, found in whole.items()}
    findings += judge_values("matrix_speed", speeds, cluster, {})
    speeds = {}
    for number, found in whole.items():
        inner = [g.gigabytes_per_second for r in found for g in r.groups if len(g.nodes) == 1 and not g.error]
        speeds |= {nodes[number]: min(inner)} if inner else {}
    findings += judge_values("speed_in_node", speeds, cluster, {})
    findings += _judge_pairs(nodes, records, absent, cluster)
    return [finding for finding in findings if finding.check not in cluster.checks.without]


def _judge_pairs(
    nodes: Sequence[str], records: Sequence[RankRecord], absent: set[int], cluster: ClusterSettings
) -> list[Finding]:
    """Return the nodes to blame for pairs that failed, or that were slow beside the other pairs."""
    seen: dict[tuple[int, ...], list[GroupResult]] = {}
    for record in records:
        for group in record.groups:
            if len(group.nodes) == 2 and not set(group.nodes) & absent:
                seen.setdefault(group.nodes, []).append(group)
    pairs = {(nodes[a], nodes[b]): results for (a, b), results in seen.items()}
    errors = {pair: next((g.error for g in results if g.error), "") for pair, results in pairs.items()}
    findings = _blame("all_reduce_in_pairs", errors)
    if cluster.device == "cpu":
        return findings
    speeds = {p: min(g.gigabytes_per_second for g in results) for p, results in pairs.items() if not errors[p]}
    if speeds:
        median = statistics.median(speeds.values())
        least = cluster.checks.limits.get("speed_in_pairs", CHECKS["speed_in_pairs"].limit) * median
        slow = {p: f"{s:.3g} GB/s, half of all pairs have {median:.3g}" if s < least else "" for p, s in speeds.items()}
        findings += _blame("speed_in_pairs", slow)
    return findings


def _blame(check: str, errors: Mapping[tuple[str, str], str]) -> list[Finding]:
    verdict = name_culprits({pair: not error for pair, error in errors.items()})
    findings = []
    sound = {node for pair, error in errors.items() if not error for node in pair}
    for node in sorted(verdict.culprits | verdict.suspects | verdict.untested):
        (first, second), error = next((pair, text) for pair, text in errors.items() if node in pair and text)
        finding = _finding(node, check, f"with {second if node == first else first}: {error}")
        is_surely_bad = node not in sound and node not in verdict.untested
        findings.append(dataclasses.replace(finding, excludes=finding.excludes and is_surely_bad))
    return findings
