from __future__ import annotations

import json
import re
from pathlib import Path

import cli_dummies
import pytest
import torch
from cli_dummies import LOG
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from flowbench.config import ConfigError, Experiment, compose
from flowbench.config.classes import Arguments
from flowbench.core.seeds import derive_seed

NETWORK = "model.init_args.network"


def test_validation_builds_nothing_and_leaves_the_configuration_alone(experiment_file):
    experiment = Experiment.from_files([experiment_file])
    assert LOG == []
    assert experiment.resolved == compose([experiment_file]).resolved


def test_build_makes_everything_in_order_with_the_given_options(experiment_file):
    experiment = Experiment.from_files(
        [experiment_file],
        [
            "callbacks.watch={class_path: cli_dummies.Watch, init_args: {every: 4}}",
            "loggers.csv={class_path: lightning.pytorch.loggers.CSVLogger}",
            "model.init_args.optimizer={lr: 1e-2}",
        ],
    )
    built = experiment.build()
    assert LOG[0] == "data"
    assert LOG[-1] == "evaluator"
    assert built.datamodule.batch_size == 16
    assert built.datamodule.seed == 3  # the run's seed
    model = built.model
    assert type(model) is cli_dummies.Family
    assert model.spec == built.datamodule.spec
    assert (model.network.shape, model.network.num_classes, model.network.width) == ((1, 8, 8), 10, 8)
    assert model.pair.kappa == 0.5
    assert model.optimizer.lr == 0.01
    assert built.trainer_arguments == {"accelerator": "cpu", "devices": 1}
    assert built.budget == {"steps": 10}
    assert built.evaluator.metrics["fd"].features == "digits-cnn"
    assert built.callbacks["watch"].every == 4
    assert isinstance(built.loggers["csv"], CSVLogger)
    assert built.loggers["csv"].root_dir.startswith(str(experiment.run_dir))


class _Batches:
    def __init__(self, limit: float | int | None = None, rate: float = 1.0) -> None:
        self.limit, self.rate = limit, rate


def test_whole_numbers_stay_whole_where_fractions_are_taken_too():
    """To Lightning one batch is 1, and all of them are 1.0."""
    for limit in (7, 1, 7.0, 0.5, None):
        arguments = Arguments("batches", _Batches, {"limit": limit, "rate": 2})
        for values in (arguments.values(), arguments.parsed):
            assert values == {"limit": limit, "rate": 2.0}
            assert type(values["limit"]) is type(limit)
            assert type(values["rate"]) is float


def test_data_keep_a_seed_of_their_own(experiment_file):
    assert Experiment.from_files([experiment_file], ["data.seed=9"]).build().datamodule.seed == 9


def test_the_weights_follow_the_seed_and_not_what_the_data_drew(experiment_file):
    def weights(*overrides: str) -> torch.Tensor:
        torch.manual_seed(123)
        return Experiment.from_files([experiment_file], overrides).build().model.network.weight

    torch.manual_seed(derive_seed(3, "init") % 2**32)
    expected = torch.randn(8)
    assert torch.equal(weights(), expected)
    assert torch.equal(weights(), weights("data.batch_size=17"))
    assert not torch.equal(weights(), weights("seed=4"))


def test_an_experiment_builds_again_and_again(experiment_file):
    experiment = Experiment.from_files([experiment_file])
    first, second = experiment.build().model, experiment.build().model
    assert first is not second
    assert torch.equal(first.network.weight, second.network.weight)


def test_options_that_a_class_forwards_are_known(experiment_file):
    experiment = Experiment.from_files(
        [experiment_file], ["model.class_path=cli_dummies.Forwarding", "model.init_args.dropout=0.25"]
    )
    assert experiment.build().model.dropout == 0.25


def test_trainer_objects_are_built(experiment_file):
    strategy = "{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {process_group_backend: gloo}}"
    built = Experiment.from_files([experiment_file], [f"trainer.strategy={strategy}"]).build()
    assert isinstance(built.trainer_arguments["strategy"], DDPStrategy)


def test_evaluator_and_budget_are_optional(experiment_file):
    experiment = Experiment.from_files([experiment_file], ["evaluator=null", "budget=null", "trainer.max_steps=3"])
    built = experiment.build()
    assert built.evaluator is None
    assert built.budget is None
    assert built.trainer_arguments["max_steps"] == 3


@pytest.fixture
def required(write):
    write(
        "ae.yaml",
        """
        data: {dataset: digits}
        model: {class_path: cli_dummies.Encoder, init_args: {width: 2}}
        budget: {steps: 5}
        """,
    )
    return lambda family: write(
        "latent.yaml",
        f"""
        data: {{dataset: digits}}
        model:
          class_path: cli_dummies.{family}
          init_args: {{network: {{class_path: cli_dummies.Network}}}}
        budget: {{steps: 5}}
        requires: {{autoencoder: ae.yaml}}
        """,
    )


def test_a_required_checkpoint_is_handed_over_as_a_path(required):
    experiment = Experiment.from_files([required("PathFamily")])
    assert experiment.requirements["autoencoder"].resolved["model"]["init_args"] == {"width": 2}
    built = experiment.build({"autoencoder": Path("x/last.ckpt")})
    assert built.model.autoencoder == "x/last.ckpt"


def test_a_required_model_is_loaded_when_the_argument_is_one(required, monkeypatch):
    loaded = []

    def load(module, checkpoint):
        loaded.append((module, checkpoint))
        return module.eval()

    monkeypatch.setattr("flowbench.families.latents.autoencoder.load_trained", load)
    plain = Experiment.from_files([required("Family")], ["requires=null"]).build().model
    model = Experiment.from_files([required("ModuleFamily")]).build({"autoencoder": Path("x.ckpt")}).model
    assert loaded == [(model.held[0], Path("x.ckpt"))]
    assert model.held[0].linear.in_features == 2
    assert torch.equal(model.network.weight, plain.network.weight)  # what it drew does not reach the weights


def test_required_checkpoints_are_checked(required):
    experiment = Experiment.from_files([required("PathFamily")])
    with pytest.raises(ConfigError, match=r"requires.autoencoder has no checkpoint yet; run: flowbench prepare"):
        experiment.build()
    with pytest.raises(ConfigError, match="checkpoint 'encoder' is given"):
        experiment.build({"autoencoder": Path("a"), "encoder": Path("b")})


def test_required_names_and_experiments_are_validated(required):
    file = required("Family")
    with pytest.raises(ConfigError, match=r"requires.autoencoder: Family does not accept 'autoencoder'"):
        Experiment.from_files([file])
    file = required("PathFamily")
    with pytest.raises(ConfigError, match="given and required at once"):
        Experiment.from_files([file], ["model.init_args.autoencoder=x.ckpt"])
    with pytest.raises(ConfigError, match=r"requires.autoencoder: model.init_args: Encoder does not accept 'widht'"):
        Experiment.from_files([file], ["requires.autoencoder.model.init_args.widht=3"])
    with pytest.raises(ConfigError, match=r"requires.autoencoder: training has no end"):
        Experiment.from_files([file], ["requires.autoencoder.budget=null"])


def test_the_run_directory_is_a_function_of_the_configuration(experiment_file, write):
    experiment = Experiment.from_files([experiment_file])
    assert experiment.run_dir == Path("runs") / f"wcfm-{experiment.fingerprint}"
    assert Experiment.from_files([experiment_file], ["run.name=mine"]).run_dir == Path("runs/mine")
    assert Experiment.from_files([experiment_file], ["run={dir: /x/y, name: z}"]).run_dir == Path("/x/y")
    experiment.save(experiment.run_dir)
    again = Experiment.from_files([experiment.run_dir / "config.yaml"])
    assert again.run_dir == experiment.run_dir
    assert Experiment.from_files([experiment.run_dir / "config.yaml"], ["seed=8"]).run_dir != experiment.run_dir


def test_saved_configurations_repeat_the_run(required, tmp_path):
    file = required("PathFamily")
    experiment = Experiment.from_files([file], ["seed=5", "model.init_args.network.init_args.scale='${seed}'"])
    experiment.save(tmp_path / "out" / "run")
    saved = {p.name for p in (tmp_path / "out" / "run").iterdir()}
    assert saved == {"config.yaml", "config.source.yaml"}
    (tmp_path / "ae.yaml").unlink()  # config.yaml holds all it needs
    again = Experiment.from_files([tmp_path / "out/run/config.yaml"])
    assert again.resolved == experiment.resolved
    assert again.fingerprint == experiment.fingerprint
    assert again.build({"autoencoder": Path("x")}).model.network.scale == 5.0
    assert "${seed}" in (tmp_path / "out/run/config.source.yaml").read_text()


def test_saving_leaves_the_old_file_when_the_disk_is_full(experiment_file, tmp_path, monkeypatch):
    experiment = Experiment.from_files([experiment_file])
    experiment.save(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowbench.core.storage.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Experiment.from_files([experiment_file], ["seed=7"]).save(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert len(list((tmp_path / "run").iterdir())) == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # unknown keys, at every level
        (["modle.x=1"], "unknown key 'modle' in the experiment; did you mean 'model'?"),
        (["run.nam=x"], "run: unknown key 'nam'; did you mean 'name'?"),
        (["data.datset=x"], "data: Data does not accept 'datset'; did you mean 'dataset'?"),
        (["trainer.max_step=1"], "trainer: Trainer does not accept 'max_step'; did you mean 'max_steps'?"),
        (
            ["evaluator.num_sample=1"],
            "evaluator: Evaluator does not accept 'num_sample'; did you mean 'num_samples'?",
        ),
        (["budget={step: 3}"], "budget: unknown kind 'step'; did you mean 'steps'?"),
        (["model.init_arg=1"], "model: unknown key 'init_arg' beside class_path; did you mean 'init_args'?"),
        (
            ["model.init_args.netwrk=1"],
            "model.init_args: Family does not accept 'netwrk'; did you mean 'network'?",
        ),
        (
            [f"{NETWORK}.init_args.widht=1"],
            f"{NETWORK}.init_args: Network does not accept 'widht'; did you mean 'width'?",
        ),
        (
            ["model.init_args.weight.init_args.zeta=1"],
            "Gibbs does not accept 'zeta'; known: kappa, normalization",
        ),
        (
            ["model.init_args.blocks=[{class_path: cli_dummies.Gibbs, init_args: {kapa: 1}}]"],
            "model.init_args.blocks[0].init_args: Gibbs does not accept 'kapa'; did you mean 'kappa'?",
        ),
        (
            ["evaluator.metrics.fd.init_args.kk=1"],
            "evaluator.metrics.fd.init_args: Distance does not accept 'kk'",
        ),
        (
            ["callbacks.w={class_path: cli_dummies.Watch, init_args: {evry: 1}}"],
            "Watch does not accept 'evry'",
        ),
        (
            [f"{NETWORK}.init_args.shape=[1]"],
            "Network does not accept 'shape' here, flowbench passes it; remove it",
        ),
        # wrong types
        (["data.batch_size=big"], "data.batch_size: Data expects int, got 'big' (str)"),
        (["data.batch_size=1.5"], "data.batch_size: Data expects int, got 1.5 (float)"),
        (["data.batch_size=null"], "data.batch_size: Data expects int, got null"),
        (
            ["data.dequantize=uniformm"],
            "data.dequantize: Data expects one of 'uniform', 'none', got 'uniformm' (str); did",
        ),
        (["trainer.max_steps=[1]", "budget=null"], "trainer.max_steps: Trainer expects int, got [1] (list)"),
        (
            ["evaluator.sweep.n=[a]"],
            "evaluator.sweep: Evaluator expects dict[str, list[int]] or null, got {'n': ['a']}",
        ),
        (
            [f"{NETWORK}.init_args.width=wide"],
            f"{NETWORK}.init_args.width: Network expects int, got 'wide' (str)",
        ),
        (
            [f"{NETWORK}=3"],
            f"{NETWORK}: Family expects Callable[[tuple[int, ...], int | None], Module], got 3 (int)",
        ),
        (
            ["model.init_args.optimizer.lr=fast"],
            "model.init_args.optimizer.lr: Optimizer expects float, got 'fast'",
        ),
        (
            ["model.init_args.optimizer.betas=[1]"],
            "optimizer.betas: Optimizer expects tuple[float, float], got [1]",
        ),
        (
            ["model.init_args.optimizer.lrr=1"],
            "model.init_args.optimizer: Optimizer does not accept 'lrr'; did you mean",
        ),
        (
            ["model.init_args.dropout={a: 1}"],
            "model.init_args.dropout: Family expects float, got {'a': 1} (dict)",
        ),
        (["seed=-1"], "seed must be a whole number in [0, 9223372036854775807], got -1"),
        (["seed=a"], "seed must be a whole number in [0, 9223372036854775807], got 'a'"),
        (["run=3"], "run must hold dir and name, got 3"),
        (["data=[1]"], "data must hold 'name: value' lines, got [1]"),
        (
            ["model=cli_dummies.Family"],
            "model must be a mapping with class_path and init_args, got 'cli_dummies.Family'",
        ),
        (["model.init_args=3"], "model.init_args must hold 'name: value' lines, got 3 (int)"),
        (["callbacks=[1]"], "callbacks must be named: callbacks: {my_name: {class_path: ...}}, got a list"),
        (["budget=fast"], "budget must be one of train_flops, train_seconds, train_hours, steps, samples_seen, epochs"),
        # classes
        (
            ["model.class_path=cli_dumies.Family"],
            "model.class_path: no module 'cli_dumies' (in 'cli_dumies.Family')",
        ),
        (
            ["model.class_path=flowbench.famlies.X"],
            "no module 'flowbench.famlies' (in 'flowbench.famlies.X'); did you mean",
        ),
        (
            ["model.class_path=cli_dummies.Famly"],
            "module 'cli_dummies' has no class 'Famly'; did you mean 'Family'?",
        ),
        (
            [f"{NETWORK}.class_path=cli_dummies.Netwrk"],
            f"{NETWORK}.class_path: module 'cli_dummies' has no class 'Netwrk'",
        ),
        (["model.class_path=cli_dummies.not_a_class"], "'cli_dummies.not_a_class' is a int, not a class"),
        (["model.class_path=Family"], "model.class_path: 'Family' names no module; write the full name"),
        (["model.class_path=3"], "model.class_path must be a dotted name"),
        (
            ["model.class_path=cli_dummies.Gibbs", "model.init_args=null"],
            "model.class_path: Gibbs is not a LightningModule",
        ),
        (
            [f"{NETWORK}={{class_path: cli_dummies.Square}}"],
            f"{NETWORK}.class_path: Square cannot stand here",
        ),
        (
            ["model.init_args.weight={class_path: cli_dummies.Distance, init_args: {features: a}}"],
            "is not a Weight",
        ),
        (["evaluator.metrics.x={class_path: cli_dummies.Gibbs}"], "cli_dummies.Gibbs is not a Metric"),
        (["callbacks.x={class_path: cli_dummies.Gibbs}"], "callbacks.x.class_path: Gibbs is not a Callback"),
        (
            ["model.init_args.weight.class_path=cli_dummies.Abstract"],
            "Abstract is abstract, it lacks ",
        ),
        # an option of the class that was there before
        ([f"{NETWORK}.class_path=cli_dummies.Square"], "Square does not accept 'width'; it takes none"),
        # missing arguments
        (["model.init_args={dropout: 0.5}"], "model.init_args: Family needs network"),
        (["evaluator.metrics.fd.init_args={k: 1}"], "needs features"),
        (
            ["model={class_path: cli_dummies.Untyped}"],
            "cli_dummies.Untyped does not annotate its argument 'network'; give it a type",
        ),
        (["model=null"], "the experiment has no 'model'"),
        (["data=null"], "the experiment has no 'data'"),
        # budgets and what has another place
        (
            ["budget={steps: 1, epochs: 2}"],
            "several budgets at once: budget.steps=1, budget.epochs=2; keep one",
        ),
        (
            ["budget.steps=1", "trainer.max_steps=2"],
            "several budgets at once: budget.steps=1, trainer.max_steps=2",
        ),
        (["budget.steps=0"], "budget.steps must be a number in (0, 1e+30], got 0"),
        (["budget.steps=1.5"], "budget.steps must be a whole number > 0, got 1.5"),
        (["budget={train_seconds: soon}"], "budget.train_seconds must be a number in (0, 1e+30], got 'soon'"),
        (["trainer.max_epochs=5"], "say budget.epochs=5 or trainer.max_steps=N"),
        (
            ["trainer.callbacks=[]"],
            "trainer.callbacks is not read; name each one at the top level: callbacks:",
        ),
        (["trainer.logger=false"], "trainer.logger is not read; name each one at the top level: loggers:"),
    ],
)
def test_every_mistake_is_one_line_that_names_it(experiment_file, overrides, expected):
    with pytest.raises(ConfigError) as caught:
        Experiment.from_files([experiment_file], overrides)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert len(message) < 400


def test_modules_that_fail_to_import_say_why(experiment_file, write, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    write("needs_more.py", "import a_package_that_is_not_there\n")
    write("broken.py", "raise RuntimeError('half\\nwritten')\n")
    for name, expected in (
        ("needs_more.X", "module 'needs_more' needs 'a_package_that_is_not_there', which is not installed"),
        ("broken.X", "module 'broken' cannot be imported: RuntimeError: half written"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            Experiment.from_files([experiment_file], [f"model.class_path={name}"])


def test_what_a_class_says_about_its_arguments_passes_through(experiment_file):
    experiment = Experiment.from_files([experiment_file], ["evaluator.num_samples=1"])
    with pytest.raises(ValueError, match="num_samples must be >= 2, got 1"):
        experiment.build()


def test_data_and_evaluator_are_built_alone(experiment_file, tmp_path):
    experiment = Experiment.from_files([experiment_file])
    assert experiment.build_data().seed == 3
    assert experiment.build_evaluator().num_samples == 20
    assert LOG == ["data", "evaluator"]
    assert Experiment.from_files([experiment_file], ["evaluator=null"]).build_evaluator() is None
    experiment.write(tmp_path / "alone.yaml")
    assert compose([tmp_path / "alone.yaml"]).resolved == experiment.resolved


def test_training_needs_an_end(experiment_file):
    Experiment.from_files([experiment_file]).require_budget()
    endless = Experiment.from_files([experiment_file], ["budget=null"])
    with pytest.raises(ConfigError, match=r"training has no end; give budget.steps=N"):
        endless.require_budget()


def test_from_composed_is_the_second_half_of_from_files(experiment_file):
    composed = compose([experiment_file], ["seed=4"])
    assert Experiment.from_composed(composed).resolved == Experiment.from_files([experiment_file], ["seed=4"]).resolved


@pytest.mark.parametrize(
    ("argument", "name", "options", "message"),
    [
        ("augmentation", "flowbench.families.GaussianNoise", {"std": -1}, "GaussianNoise std"),
        ("guidance", "flowbench.flows.AutoregressiveGuidance", {"scale": 0.5}, "guidance scale"),
    ],
)
def test_what_a_class_inside_a_choice_of_types_says_passes_through(argument, name, options, message):
    """Without the words of jsonargparse around it."""
    base = Path(__file__).parents[2] / "experiments" / "digits" / "tarflow_conditional.yaml"
    given = json.dumps({"class_path": name, "init_args": options})
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        Experiment.from_files([base], [f"model.init_args.{argument}={given}", "evaluator=null"]).build()
