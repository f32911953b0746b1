"""What nodes measured is judged rightly: limits, the best nodes, the culprit among pairs; and ranks really find it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_solar.node_checks import known_product, pair_rounds
from orchestrator.settings import ClusterSettings, NodeCheckSettings
from orchestrator.slurm import node_agent
from orchestrator.slurm.node_checks import (
    CHECKS,
    Finding,
    GroupResult,
    Measure,
    NodeReport,
    RankRecord,
    choose_nodes,
    judge,
    judge_ranks,
    name_culprits,
    unknown_names,
)
from orchestrator.values import from_plain
from tests.conftest import REPOSITORY

CPU = ClusterSettings(name="test", scheduler="slurm", device="cpu", ranks_per_node=1)
GPU = dataclasses.replace(CPU, device="cuda", ranks_per_node=8)


def report(node: str, **measures: Measure | float) -> NodeReport:
    return NodeReport(
        node=node,
        measures={n: m if isinstance(m, Measure) else Measure(value=m) for n, m in measures.items()},
        is_complete=True,
    )


def reports(**by_node: dict[str, Measure | float]) -> dict[str, NodeReport]:
    return {node: report(node, **measures) for node, measures in by_node.items()}


def named(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.node, finding.check) for finding in findings}


# Limits.


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ("gpu_count", 8, 7),
        ("gpu_memory", 600, 40_000),
        ("gpu_throttled", 0, 1),
        ("ecc_errors", 0, 3),
        ("row_remap", 0, 1),
        ("xid", 0, 2),
        ("temporary_disk", 20, 0.2),
        ("shared_memory", 400, 0.01),
        ("run_disk", 900, 0.5),
        ("clock_skew", 0.4, 61.0),
    ],
)
def test_a_node_beyond_a_limit_is_named_with_value_limit_and_remedy_and_a_site_may_set_another(
    check: str, good: float, bad: float
) -> None:
    found = judge(["a", "b"], reports(a={check: good}, b={check: Measure(value=bad, detail="where")}), GPU)
    assert named(found) == {("b", check)}
    assert f"{bad:.4g}" in found[0].message
    assert "(where)" in found[0].message
    assert str(found[0]).endswith(CHECKS[check].remedy)
    other = dataclasses.replace(GPU, checks=NodeCheckSettings(limits={check: bad}))
    assert judge(["b"], reports(b={check: bad}), other) == []
    without = dataclasses.replace(GPU, checks=NodeCheckSettings(without=(check,)))
    assert judge(["b"], reports(b={check: bad}), without) == []


def test_a_node_that_is_slow_beside_the_others_stands_behind_them_but_is_not_excluded() -> None:
    values: dict[str, dict[str, Measure | float]] = {n: {"gpu_clock": 1980.0} for n in "abcd"}
    values["c"] = {"gpu_clock": 1400.0}
    (found,) = judge(list("abcd"), reports(**values), GPU)
    assert (found.node, found.check, found.excludes) == ("c", "gpu_clock", False)
    assert "1400 MHz, should be at least 90% of the median of all nodes, 1980" in found.message
    assert choose_nodes("abcd", [found], 3).nodes == ("a", "b", "d")
    kept = choose_nodes("abcd", [found], 4)
    assert kept.nodes == ("a", "b", "c", "d")
    assert kept.doubtful.keys() == {"c"}


def test_a_port_that_is_down_shows_beside_the_other_nodes_and_where_there_is_none_nobody_is_blamed() -> None:
    full, less = Measure(value=3200), Measure(value=2800, detail="mlx5_3 port 1 is DOWN")
    found = judge(list("abc"), reports(a={"infiniband": full}, b={"infiniband": less}, c={"infiniband": full}), GPU)
    assert named(found) == {("b", "infiniband")}
    assert "mlx5_3 port 1 is DOWN" in found[0].message
    none = Measure(skipped="there is no InfiniBand")
    assert judge(list("ab"), reports(a={"infiniband": none}, b={"infiniband": none}), GPU) == []


def test_a_node_that_did_not_answer_or_not_to_the_end_is_not_reachable() -> None:
    half = NodeReport(node="b", measures={"xid": Measure()}, is_complete=False)
    found = judge(["a", "b", "c"], {"a": report("a", xid=0), "b": half}, GPU)
    assert named(found) == {("b", "reachable"), ("c", "reachable")}
    assert all(finding.excludes for finding in found)


def test_names_of_checks_that_do_not_exist_are_told_and_a_standard_name_cannot_be_taken() -> None:
    settings = NodeCheckSettings(
        without=("xidd",), limits={"own-one": 1.0, "gpus": 3}, own={"own-one": "true", "xid": ""}
    )
    problems = unknown_names(settings)
    assert [problem.split(":")[0] for problem in problems] == [
        "cluster.checks.without", "cluster.checks.limits", "cluster.checks.own.xid",
    ]  # fmt: skip
    assert unknown_names(NodeCheckSettings()) == []


def test_every_check_of_the_agent_is_in_the_table() -> None:
    assert {check.__name__ for check in node_agent.CHECKS} <= CHECKS.keys()
    assert all(check.__name__ in CHECKS and CHECKS[check.__name__].gpu_only for check in node_agent.GPU_CHECKS)


# The choice of nodes.


@given(st.lists(st.sampled_from(["sound", "doubtful", "bad"]), max_size=12), st.integers(1, 12))
def test_the_choice_takes_sound_nodes_first_keeps_the_order_and_accounts_for_every_node(
    kinds: list[str], wanted: int
) -> None:
    order = [f"n{number:02d}" for number in range(len(kinds))]
    findings = [
        Finding(node=node, check="c", message="m", remedy="r", excludes=kind == "bad")
        for node, kind in zip(order, kinds, strict=True)
        if kind != "sound"
    ]
    choice = choose_nodes(order, findings, wanted)
    kind_of = dict(zip(order, kinds, strict=True))
    assert list(choice.nodes) == sorted(choice.nodes)
    assert sorted([*choice.nodes, *choice.spares, *choice.dropped]) == order
    assert choice.dropped.keys() == {node for node in order if kind_of[node] == "bad"}
    assert len(choice.nodes) + choice.missing == wanted
    assert choice.missing == 0 or not choice.spares
    if any(kind_of[node] == "doubtful" for node in choice.nodes):
        assert all(kind_of[node] == "doubtful" for node in choice.spares)


# Pairs.


def outcome(nodes: int, bad: set[int]) -> dict[tuple[str, str], bool]:
    pairs = [pair for pairs in pair_rounds(nodes) for pair in pairs]
    return {(f"n{a}", f"n{b}"): not {a, b} & bad for a, b in pairs}


@given(st.integers(2, 40))
def test_no_node_is_in_two_pairs_of_a_round_and_every_node_is_in_both_rounds_where_their_number_is_even(
    nodes: int,
) -> None:
    rounds = pair_rounds(nodes)
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members))
        assert set(members) <= set(range(nodes))
    missing = [sorted(set(range(nodes)) - {n for pair in pairs for n in pair}) for pairs in rounds]
    assert missing == ([[], []] if nodes % 2 == 0 else [[nodes - 1], [0]])


@given(st.integers(3, 40), st.data())
def test_a_single_bad_node_is_named_and_no_other(nodes: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, nodes - 1))
    verdict = name_culprits(outcome(nodes, {bad}))
    assert verdict.culprits == {f"n{bad}"}
    assert verdict.suspects == frozenset()
    ends = {1: "n0", nodes - 2: f"n{nodes - 1}"}
    alone = {ends[bad]} if nodes % 2 and bad in ends and nodes > 3 else set()
    if nodes == 3 and bad == 1:
        alone = {"n0", "n2"}
    assert verdict.untested == alone


@given(st.integers(4, 40), st.data())
def test_of_several_bad_nodes_each_with_a_sound_partner_all_are_named_and_no_sound_one(
    nodes: int, data: st.DataObject
) -> None:
    nodes -= nodes % 2
    bad = data.draw(st.sets(st.integers(0, nodes - 1), max_size=nodes // 2))
    sound = {n for n in range(nodes) if n not in bad and {(n - 1) % nodes, (n + 1) % nodes} - bad}
    verdict = name_culprits(outcome(nodes, bad))
    surely = {n for n in bad if {(n - 1) % nodes, (n + 1) % nodes} & sound}
    assert {f"n{n}" for n in surely} <= verdict.culprits
    assert not verdict.culprits & {f"n{n}" for n in sound}


def test_of_two_nodes_both_are_suspects_and_a_link_between_two_sound_nodes_blames_no_node() -> None:
    verdict = name_culprits(outcome(2, {1}))
    assert (verdict.culprits, verdict.suspects) == (frozenset(), {"n0", "n1"})
    links = outcome(6, set()) | {("n2", "n3"): False}
    assert name_culprits(links).culprits == frozenset()
    assert name_culprits(links).suspects == {"n2", "n3"}
    assert name_culprits(outcome(6, set())).suspects == frozenset()


# What ranks found.


def record(node: int, *groups: GroupResult, tflops: float = 700.0, wrong: str = "") -> RankRecord:
    return RankRecord(
        rank=node, node=node, host=f"n{node}", matrix_error=wrong, matrix_tflops=tflops, groups=groups, seconds=1.0
    )


def group(*nodes: int, error: str = "", speed: float = 300.0) -> GroupResult:
    return GroupResult(nodes=nodes, error=error, gigabytes_per_second=speed)


def test_ranks_that_compute_wrongly_or_slowly_or_left_no_record_are_found() -> None:
    one_gpu = dataclasses.replace(GPU, ranks_per_node=1)
    records = [
        record(0, group(0, 1), group(3, 0)),
        record(1, group(0, 1), group(1, 2), wrong="7 elements are wrong"),
        record(2, group(2, 3), group(1, 2), tflops=500),
        record(3, group(2, 3), group(3, 0)),
    ]
    found = judge_ranks(["a", "b", "c", "d", "e"], records, one_gpu)
    assert named(found) == {("b", "matrix_product"), ("c", "matrix_speed"), ("e", "ranks")}
    assert [finding.node for finding in found if not finding.excludes] == ["c"]


def test_a_node_whose_pairs_are_slow_is_told_but_not_on_a_cpu() -> None:
    pairs = [pair for pairs in pair_rounds(6) for pair in pairs]
    records = [
        record(n, *(group(*pair, speed=40 if 4 in pair else 300) for pair in pairs if n in pair)) for n in range(6)
    ]
    found = judge_ranks(list("abcdef"), records, dataclasses.replace(GPU, ranks_per_node=1))
    assert named(found) == {("e", "speed_in_pairs")}
    assert judge_ranks(list("abcdef"), records, CPU) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 256])
def test_the_known_product_is_exact_in_any_precision_and_each_partial_sum_is_small(
    size: int, dtype: torch.dtype
) -> None:
    left, right, expected = known_product(size, dtype, "cpu")
    assert torch.equal(left @ right, expected)
    assert torch.equal(left.long() @ right.long(), expected.long())  # exact, by whole numbers
    partial = (left[1].long() * right[:, 1].long()).cumsum(0)
    assert int(partial.max() - partial.min()) < 256  # what bf16 holds exactly, wherever a sum begins


RANKS = """
import os, signal, sys
import torch, torch.distributed
from megatron_solar import node_checks

folder, count, faulty, fault = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
started = []
for rank in range(count):
    process = os.fork()
    if process == 0:
        if rank == faulty and fault == "network":
            os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
        if rank == faulty and fault in ("dies", "hangs"):
            def fail(*_):  # in the middle of its first all-reduce
                os.kill(os.getpid(), signal.SIGKILL if fault == "dies" else signal.SIGSTOP)
            node_checks.Meeting._sum = staticmethod(fail)
        arguments = ["--nodes", str(count), "--ranks-per-node", "1", "--device", "cpu", "--seconds", "12"]
        os._exit(node_checks.main([folder, *arguments, "--rank", str(rank), "--host", f"n{rank}"]))
    started.append(process)
for rank, process in enumerate(started):
    if rank == faulty and fault == "hangs":
        continue
    os.waitpid(process, 0)
if fault == "hangs":
    os.kill(started[faulty], signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("count", "faulty", "fault", "check"),
    [
        (4, -1, "none", ""),
        (3, 1, "network", "all_reduce_in_pairs"),
        (4, 1, "dies", "ranks"),
        (5, 2, "hangs", "ranks"),
    ],
)
def test_real_ranks_name_the_one_that_dies_hangs_or_has_no_network(
    tmp_path: Path, count: int, faulty: int, fault: str, check: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path), str(count), str(faulty), fault],
        cwd=REPOSITORY, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    problems: list[str] = []
    records = [
        from_plain(RankRecord, json.loads(path.read_text()), "", problems) for path in tmp_path.glob("rank_*.json")
    ]
    assert problems == []
    found = judge_ranks([f"n{n}" for n in range(count)], [r for r in records if r is not None], CPU)
    assert {(f.node, f.check) for f in found if f.excludes} == ({(f"n{faulty}", check)} if check else set())
    assert all(record is not None and record.matrix_tflops > 0 for record in records)


# How the agent reads a GPU's programs. Made up after NVIDIA's documents; never seen on a GPU.

# Values as the manual of nvidia-smi describes them: a comma and a space between, [N/A] where there is none.
ROWS = {
    "name": "NVIDIA H100 80GB HBM3\nNVIDIA H100 80GB HBM3\n",
    "index,memory.used": "0, 1\n1, 40532\n",
    "index,clocks.max.sm": "0, 1980\n1, 1410\n",
    "index,clocks_throttle_reasons.active": "0, 0x0000000000000001\n1, 0x0000000000000048\n",
    "index,ecc.errors.uncorrected.volatile.total": "0, 0\n1, [N/A]\n",
}
REMAPPED = "00000000:04:00.0, No, No\n00000000:8B:00.0, Yes, No\n"
# The form of a line that the driver writes to the kernel's log (NVIDIA, "Xid Errors").
KERNEL_LOG = """\
[  100.335323] pci 0000:04:00.0: 252.048 Gb/s available PCIe bandwidth
[ 1399.140318] NVRM: GPU at PCI:0000:01:00: GPU-34d7319c-5b19-1e75-186d-c187099e4fe5
[ 1399.140323] NVRM: Xid (PCI:0000:01:00): 32, Channel ID 00000009 intr 00800000
[ 2399.140323] NVRM: Xid (PCI:0000:01:00): 79, pid=0, GPU has fallen off the bus.
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that answers as nvidia-smi is documented to, and refuses the name that older drivers do not know."""
    cases = [f'"--query-gpu={fields}") printf %s "{rows}" ;;' for fields, rows in ROWS.items()]
    cases.append(f'--query-remapped-rows=*) printf %s "{REMAPPED}" ;;')
    cases.append('*) echo "Field \\"${1##*,}\\" is not a valid field to query."; exit 2 ;;')
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncase $1 in\n" + "\n".join(cases) + "\nesac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("stand_in")
def test_the_rows_of_nvidia_smi_are_read_as_documented_and_an_old_driver_is_asked_by_old_names() -> None:
    assert node_agent.gpu_count({}) == (2, "NVIDIA H100 80GB HBM3")
    assert node_agent.gpu_memory({}) == (40532, "GPU 1")
    assert node_agent.gpu_clock({}) == (1410, "GPU 1")
    assert node_agent.gpu_throttled({}) == (1, "GPU 1: 0x0000000000000048")
    assert node_agent.ecc_errors({}) == (0, "GPU 0")
    assert node_agent.row_remap({}) == (1, "00000000:8B:00.0 Yes No")
    with pytest.raises(node_agent.NotMeasuredError, match="not a valid field"):
        node_agent.nvidia_smi("--query-gpu=index,no.such.field")


def test_a_machine_without_nvidia_smi_fails_its_gpu_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="there is no nvidia-smi"):
        node_agent.gpu_count({})


def test_an_xid_of_the_hardware_counts_for_a_day_and_one_that_a_program_can_cause_never() -> None:
    (found,) = node_agent.hardware_xids(KERNEL_LOG, 3000.0)
    assert "fallen off the bus" in found
    assert node_agent.hardware_xids(KERNEL_LOG, 2399.0 + 25 * 3600) == []


def test_infiniband_is_the_sum_of_active_ports_and_names_those_that_are_not(tmp_path: Path) -> None:
    with pytest.raises(node_agent.NotMeasuredError):
        node_agent.infiniband({}, tmp_path / "none")
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN"), ("mlx5_2", "4: ACTIVE")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert node_agent.infiniband({}, tmp_path) == (800, "mlx5_1 port 1 is DOWN")
