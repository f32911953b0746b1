"""Settings from YAML and overrides: what lies over what, what stays text, and what is refused how."""

from pathlib import Path

import pytest

from orchestrator.checks import time_limit_seconds
from orchestrator.config import compose, paths_in_force, to_yaml
from orchestrator.errors import ConfigError


@pytest.fixture(autouse=True)
def work(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder under an empty home, so that only the packaged conf/ counts."""
    folder = home / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def problems(recipe: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        compose(recipe, overrides)
    assert caught.value.problems, caught.value
    return caught.value.problems


@pytest.mark.parametrize("recipe", ["solar-10.7b", "demo", "demo-base"])
def test_the_packaged_recipes_can_be_run_as_they_are(recipe: str) -> None:
    assert compose(recipe).name == recipe


def test_a_model_from_another_keeps_what_it_does_not_say(work: Path) -> None:
    settings = compose("demo")
    assert settings.model.num_layers == 12
    assert settings.model.hidden_size == compose("demo-base").model.hidden_size
    assert settings.cluster.ranks_per_node == 2
    assert settings.cluster.scheduler == "local"


def test_the_working_folder_counts_before_the_home_and_the_home_before_the_package(home: Path, work: Path) -> None:
    assert compose("demo").cluster.name == "local"
    write(home / ".config/orchestrate/cluster/local.yaml", "from: local\nname: of-home\nwarning_seconds: 7\n")
    assert compose("demo").cluster.name == "of-home"
    write(work / "conf/cluster/local.yaml", "from: local\nname: of-work\n")
    settings = compose("demo")
    assert (settings.cluster.name, settings.cluster.warning_seconds) == ("of-work", 7)


def test_a_site_adds_its_partition_to_the_packaged_cluster(work: Path) -> None:
    write(work / "conf/cluster/h100.yaml", 'from: h100\npartition: batch\naccount: "012"\n')
    cluster = compose("solar-10.7b").cluster
    assert (cluster.partition, cluster.account, cluster.peak_tflops, cluster.nodes) == ("batch", "012", 989.0, 32)


def test_a_recipe_from_another_replaces_the_model_that_it_names(work: Path) -> None:
    write(work / "mine.yaml", "from: demo\nname: mine\nmodel: tiny\n")
    settings = compose("mine.yaml")
    assert (settings.name, settings.model.num_layers, settings.layout.tensor_parallel) == ("mine", 8, 2)
    write(work / "mine.yaml", "from: demo\nmodel:\n  num_layers: 16\n")
    assert compose("mine.yaml").model.num_layers == 16


def test_files_that_are_from_each_other_are_refused(work: Path) -> None:
    write(work / "conf/cluster/one.yaml", "from: two\n")
    write(work / "conf/cluster/two.yaml", "from: one\n")
    with pytest.raises(ConfigError, match="there is no other cluster of that name"):
        compose("demo", ["cluster=one"])


def test_defaults_lie_under_the_recipe(home: Path, work: Path) -> None:
    write(home / ".config/orchestrate/defaults.yaml", "cluster:\n  partition: home\n  account: home\nname: below\n")
    write(work / "conf/defaults.yaml", "cluster:\n  partition: work\npaths:\n  runs: ~/elsewhere\n")
    settings = compose("demo")
    assert (settings.name, settings.cluster.partition, settings.cluster.account) == ("demo", "work", "home")
    assert settings.paths.runs == str((home / "elsewhere").resolve())
    assert paths_in_force() == settings.paths


def test_another_cluster_leaves_nothing_of_the_first(work: Path) -> None:
    cluster = compose("solar-10.7b", ["layout.tensor_parallel=1", "cluster=local"]).cluster
    assert (cluster.name, cluster.gpu, cluster.peak_tflops, cluster.environment) == ("local", "", None, {})


def test_a_cluster_does_not_undo_a_field_given_before_it() -> None:
    given = ["cluster.nodes=8", "cluster=h100", "layout.global_batch_size=256"]
    assert compose("demo", given).cluster.nodes == 8


def test_a_cluster_may_be_a_file(work: Path) -> None:
    write(work / "lab.yaml", "from: local\nname: lab\n")
    assert compose("demo-base", ["cluster=lab.yaml"]).cluster.name == "lab"


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("cluster.time_limit=4:00:00", "cluster", "time_limit", "4:00:00"),
        ("cluster.account=012", "cluster", "account", "012"),
        ("cluster.account=1e5", "cluster", "account", "1e5"),
        ("cluster.account=null", "cluster", "account", None),
        ("cluster.account=", "cluster", "account", None),
        ("cluster.partition=no", "cluster", "partition", "no"),
        ("tracking.experiment=a: [b", "tracking", "experiment", "a: [b"),
        ("tracking.experiment=${oc.env:HOME}", "tracking", "experiment", "${oc.env:HOME}"),
        ("tracking.uri=http://host:5000/?a=b", "tracking", "uri", "http://host:5000/?a=b"),
        ("training.tokens=1e12", "training", "tokens", 10**12),
        ("training.tokens=2_000_000", "training", "tokens", 2_000_000),
        ("training.learning_rate=3e-3", "training", "learning_rate", 3e-3),
        ("training.weight_decay=0", "training", "weight_decay", 0.0),
        ("training.decay=linear", "training", "decay", "linear"),
        ("layout.sequence_parallel=true", "layout", "sequence_parallel", True),
        ("cluster.price_per_gpu_hour=2.5", "cluster", "price_per_gpu_hour", 2.5),
        ("cluster.environment.OMP_NUM_THREADS=1", "cluster", "environment", {"OMP_NUM_THREADS": "1"}),
        ("data.weights=0.5", "data", "weights", (0.5,)),
        ("data.weights=[1]", "data", "weights", (1.0,)),
    ],
)
def test_an_override_becomes_the_value_of_its_type(override: str, section: str, field: str, value: object) -> None:
    settings = compose("demo-base", [override])
    found = getattr(getattr(settings, section), field)
    assert found == value
    assert type(found) is type(value)


def test_a_fields_own_name_is_enough_where_no_other_section_has_it() -> None:
    settings = compose("demo-base", ["tokens=1000000", "learning_rate=1e-3", "name=mine"])
    assert (settings.training.tokens, settings.training.learning_rate, settings.name) == (1_000_000, 1e-3, "mine")


def test_a_name_that_yaml_takes_for_false_stays_text() -> None:
    assert compose("demo", ["name=no"]).name == "no"


def test_lists_and_the_home_folder_in_paths(home: Path, work: Path) -> None:
    one = compose("demo", ["data.train=~/text", "base=~/b"])
    assert one.data.train == (str((home / "text").resolve()),)
    assert one.base == str((home / "b").resolve())
    several = compose("demo", ["data.train=[a, ../b]", "data.weights=[0.7, 0.3]"])
    assert several.data.train == (str(work.resolve() / "a"), str(work.resolve().parent / "b"))
    assert several.data.weights == (0.7, 0.3)
    assert compose("demo-base").base == "random"


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("trainig.tokens=5", "did you mean training.tokens?"),
        ("training.tokenz=5", "did you mean training.tokens?"),
        ("tokenz=5", "did you mean training.tokens?"),
        ("modle.num_layers=5", "did you mean model.num_layers?"),
        ("nmae=x", "did you mean name?"),
        ("layout.tp=2", "known are layout.tensor_parallel, "),
        ("model.num_layers.deep=2", "did you mean model.num_layers?"),
        ("=5", "should read section.field=value"),
        ("training.tokens", "should read section.field=value"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_whole_key(override: str, suggested: str) -> None:
    (problem,) = problems("demo", override)
    assert suggested in problem


def test_a_misspelt_key_in_a_file_is_answered_with_the_whole_key(work: Path) -> None:
    write(work / "mine.yaml", "from: demo\ntraining:\n  tokenz: 5\ncheckpiont:\n  interval_steps: 3\n")
    assert problems("mine.yaml") == (
        "unknown key training.tokenz; did you mean training.tokens?",
        "unknown key checkpiont; did you mean checkpoint?",
    )


def test_text_that_yaml_took_for_a_number_is_to_be_quoted(work: Path) -> None:
    write(work / "mine.yaml", "from: demo\nname: no\ncluster:\n  account: 012\n  time_limit: 4:00:00\n")
    found = problems("mine.yaml")
    assert len(found) == 3
    assert all(problem.endswith("put it in quotes") for problem in found)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.tokens=many", "training.tokens should be a whole number, found 'many'"),
        ("training.tokens=1.5", "training.tokens should be a whole number, found 1.5"),
        ("training.tokens=true", "training.tokens should be a whole number, found True"),
        ("training.tokens=[", "training.tokens=[ should be YAML"),
        ("training.learning_rate=high", "training.learning_rate should be a number, found 'high'"),
        ("training.decay=Cosine", "training.decay should be one of cosine, linear, constant, wsd, found 'Cosine'"),
        ("layout.sequence_parallel=2", "layout.sequence_parallel should be true or false, found 2"),
        ("cluster.environment=5", "cluster.environment should be a mapping, found 5"),
        ("data=5", "data should be a mapping of fields, found 5"),
        ("data.weights=[a]", "data.weights[0] should be a number, found 'a'"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_was_found(override: str, message: str) -> None:
    (problem,) = problems("demo", override)
    assert message in problem


def test_a_missing_field_says_how_it_is_given(work: Path) -> None:
    write(work / "mine.yaml", "name: mine\nmodel: tiny\ncluster: local\nbase: random\ntraining: {}\n")
    found = problems("mine.yaml")
    assert "data is missing; set it in the recipe or as data=VALUE" in found
    assert "training.tokens is missing; set it in the recipe or as training.tokens=VALUE" in found


def test_all_problems_are_told_at_once() -> None:
    typed = problems("demo", "trainig.tokens=5", "training.tokens=many", "nonsense", "layout.micro_batch_size=x")
    assert len(typed) == 4
    sizes = problems(
        "demo", "name=a/b", "training.warmup_share=1", "model.num_query_groups=3", "cluster.time_limit=soon",
        "layout.tensor_parallel=3", "checkpoint.interval_steps=0",
    )  # fmt: skip
    assert len(sizes) == 6
    also_the_layout = problems("demo", "training.warmup_share=1", "layout.global_batch_size=7")
    assert len(also_the_layout) == 2


@pytest.mark.parametrize(
    "override",
    [
        "name=last", "name=../x", "name=a b", "name=-x", "name=a@3", "name=", "name=" + "x" * 101,
        "model.num_layers=0", "model.rms_norm_eps=-1",
        "data.sequence_length=0", "data.sequence_length=257", "data.train=[]", "data.weights=[0.5, 0.5]",
        "data.weights=-1",
        "training.tokens=1023", "training.tokens=-5", "training.learning_rate=.nan", "training.learning_rate=-1",
        "training.minimum_learning_rate=1", "training.adam_beta1=1", "training.adam_beta2=-0.1", "training.adam_eps=0",
        "training.weight_decay=.inf", "training.gradient_clip=0", "training.seed=-1", "training.validation_samples=0",
        "layout.tensor_parallel=0", "layout.pipeline_parallel=-1", "layout.global_batch_size=0",
        "layout.virtual_pipeline_parallel=2",
        "cluster.nodes=0", "cluster.nodes=2", "cluster.ranks_per_node=0", "cluster.ranks_per_node=-2",
        "cluster.time_limit=24h", "cluster.time_limit=0:00:30", "cluster.warning_seconds=-1",
        "cluster.warning_seconds=1e9", "cluster.peak_tflops=0", "cluster.price_per_gpu_hour=-1",
        "max_restarts_without_progress=0", "max_preemptions_without_progress=0", "patience.step_seconds=-5",
        "patience.save_seconds=.inf",
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(override: str) -> None:
    problems("demo", override)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("dmeo", (), "did you mean demo?"),
        ("nothing.yaml", (), "no recipe file nothing.yaml"),
        ("demo", ("cluster=h10",), "did you mean h100?"),
        ("demo", ("model=solar",), "did you mean solar-10.7b?"),
        ("demo", ("model.num_layers=${nowhere}",), "cannot be resolved"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_the_nearest(
    recipe: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(recipe, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- a list", "a: 1\na: 2\n", "\tx: 1", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_by_its_name(work: Path, text: str) -> None:
    write(work / "mine.yaml", text)
    with pytest.raises(ConfigError, match=r"mine\.yaml should hold"):
        compose("mine.yaml")


def test_a_folder_in_the_place_of_a_file_is_refused(work: Path) -> None:
    (work / "mine.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"mine\.yaml cannot be read"):
        compose("mine.yaml")


def test_a_mandatory_value_left_open_is_refused(work: Path) -> None:
    write(work / "mine.yaml", "name: mine\nbase: ???\n")
    with pytest.raises(ConfigError, match="base"):
        compose("mine.yaml")


def test_the_written_configuration_composes_to_the_same_settings(work: Path) -> None:
    given = ["name=no", "cluster.account=012", "cluster.environment.A=${b}", "training.learning_rate=1e-3"]
    settings = compose("demo", given)
    write(work / "again.yaml", to_yaml(settings).replace("${b}", r"\${b}"))
    assert compose("again.yaml") == settings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24:00:00", 86400), ("1-02:03:04", 93784), ("0:00:01", 1), ("4:00", None), ("-4:00:00", None), ("²:00:00", None),
     ("4:00:00\n", None), ("1-2-4:00:00", None), ("", None)],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_writes_it(text: str, seconds: int | None) -> None:
    assert time_limit_seconds(text) == seconds
