"""An experiment: a configuration that is known to be valid, and how to build what it describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbench.config.annotations import constructor_hints, takes_path
from flowbench.config.budget_section import read_budget
from flowbench.config.classes import Arguments, Object, accepted_names
from flowbench.config.compose import Composed, compose, fingerprint, to_yaml
from flowbench.config.errors import ConfigError
from flowbench.config.files import check_files
from flowbench.config.fitting import fit_experiment
from flowbench.config.imports import import_class
from flowbench.config.references import given_references
from flowbench.config.seed_section import read_seeds
from flowbench.config.text import shown
from flowbench.config.trainer import check_trainer, check_trainer_numbers
from flowbench.core.checks import check_seed
from flowbench.core.nearest import suggestion
from flowbench.core.places import expand
from flowbench.core.storage import write_text
from flowbench.core.terminal import wrapped

if TYPE_CHECKING:
    from lightning import Callback, LightningModule
    from lightning.pytorch.loggers import Logger

    from flowbench.data import DataSpec, FlowDataModule
    from flowbench.evaluation import Evaluator

__all__ = ["Built", "Experiment"]

SECTIONS = (
    "seed",
    "seeds",
    "data",
    "model",
    "trainer",
    "budget",
    "evaluator",
    "callbacks",
    "loggers",
    "requires",
    "run",
    "files",
)
RUN_KEYS = ("dir", "name", "bench", "problem", "contender")
_RUN_FILES = ("config", "config.source")


@dataclass(frozen=True)
class Built:
    """The objects of one run.

    Attributes:
        datamodule: the data, seeded with the run's seed.
        model: the family, made for the data's specification.
        trainer_arguments: what ``trainer:`` gives, for ``lightning.Trainer``; defaults are left to it.
        evaluator: the evaluator, None when the experiment has none.
        callbacks: by name, the order of the configuration.
        loggers: by name.
        budget: ``{kind: amount}``; None when ``trainer.max_steps`` is the limit or there is none.

    Example:
        >>> built = Experiment.from_files(["flowbench:toy/cfm.yaml"], ["budget.steps=100"]).build()
        >>> type(built.model).__name__, built.budget, sorted(built.loggers)
        ('FlowMatching', {'steps': 100}, ['tensorboard'])
    """

    datamodule: FlowDataModule
    model: LightningModule
    trainer_arguments: dict[str, Any]
    evaluator: Evaluator | None
    callbacks: dict[str, Callback]
    loggers: dict[str, Logger]
    budget: dict[str, float] | None


@dataclass(frozen=True)
class Experiment:
    """A validated configuration.

    Attributes:
        resolved: plain containers, required experiments inlined: enough to repeat the run.
        source_yaml: the merged configuration before interpolation.
        fingerprint: names the result (see ``compose.fingerprint``).
        seed: the run's seed.
        run_dir: ``run.dir``, else ``runs/<run.name>``, else ``runs/<file>-<fingerprint>``: the same
            configuration is the same run.
        requirements: experiments whose checkpoints the model needs, by the name of the model's argument.
        home: folder of the run whose saved configuration was read; None for other files.

    Example:
        >>> experiment = Experiment.from_files(["flowbench:toy/cfm.yaml"], ["budget.steps=100", "seed=3"])
        >>> experiment.budget, experiment.seed, experiment.model_class.__name__
        ({'steps': 100}, 3, 'FlowMatching')
        >>> experiment.run_dir.name == f"cfm-{experiment.fingerprint}"
        True
    """

    resolved: dict[str, Any]
    source_yaml: str
    fingerprint: str
    seed: int
    run_dir: Path
    requirements: dict[str, Experiment]
    _parts: _Parts = field(repr=False, compare=False)
    home: Path | None = None

    @classmethod
    def from_files(cls, files: Sequence[str | Path], overrides: Iterable[str] = ()) -> Experiment:
        """Compose files and overrides, and validate every key, class and type; nothing is built.

        Args:
            files: experiment files, later ones win.
            overrides: ``key=value`` texts.

        Raises:
            ConfigError: one line about the first thing that is wrong.
        """
        return cls.from_composed(compose(files, overrides))

    @classmethod
    def from_composed(cls, composed: Composed) -> Experiment:
        """Validate a composed configuration.

        Raises:
            ConfigError: one line about the first thing that is wrong.
        """
        file = composed.files[0]
        home = file.parent if file.stem in _RUN_FILES else None
        return cls._from_resolved(composed.resolved, composed.source_yaml, home.name if home else file.stem, home)

    @classmethod
    def _from_resolved(
        cls, resolved: dict[str, Any], source_yaml: str, stem: str, home: Path | None = None
    ) -> Experiment:
        _check_sections(resolved)
        resolved = fit_experiment(resolved)
        name = fingerprint(resolved)
        seed = _seed(resolved.get("seed", 0))
        run_dir = _run_dir(resolved.get("run"), stem, name)
        requirements = {k: _requirement(k, v) for k, v in (resolved.get("requires") or {}).items()}
        parts = _Parts.validate(resolved, seed, run_dir, tuple(requirements))
        return cls(resolved, source_yaml, name, seed, run_dir, requirements, parts, home)

    def at(self, run_dir: Path) -> Experiment:
        """The same experiment, whose run lies in another folder."""
        run = {**(self.resolved.get("run") or {}), "dir": str(run_dir)}
        return self._from_resolved({**self.resolved, "run": run}, self.source_yaml, run_dir.name, self.home)

    @property
    def model_class(self) -> type:
        """The class of the model; nothing is built."""
        return self._parts.model.cls

    def completed(self, resolved: dict[str, Any], sections: Mapping[str, Experiment]) -> Experiment:
        """This experiment with sections of others, which were validated there and need not be so again.

        Args:
            resolved: the whole configuration.
            sections: experiments that have an equal section, by its name.
        """
        parts = replace(self._parts, **{name: getattr(other._parts, name) for name, other in sections.items()})
        resolved = fit_experiment(resolved)
        return replace(self, resolved=resolved, fingerprint=fingerprint(resolved), _parts=parts)

    @property
    def seeds(self) -> dict[str, int]:
        """The seeds of the initialisation (``init``) and of the training noise (``noise``); see ``seed_section``."""
        return read_seeds(self.resolved.get("seeds"), self.seed)

    @property
    def budget(self) -> dict[str, float] | None:
        """``{kind: amount}``; None when ``trainer.max_steps`` is the limit or there is none."""
        return self._parts.budget

    def require_budget(self) -> None:
        """Check that training has an end.

        Raises:
            ConfigError: neither a budget nor ``trainer.max_steps``.
        """
        trainer = self.resolved.get("trainer") or {}
        if self.budget is None and trainer.get("max_steps") in (None, -1) and not trainer.get("fast_dev_run"):
            raise ConfigError("training has no end; give budget.steps=N, another budget or trainer.max_steps=N")

    def summary(self) -> str:
        """What would run, for ``--dry-run``: a few lines of text."""
        trainer, evaluator = self.resolved.get("trainer") or {}, self.resolved.get("evaluator") or {}
        limit = self.budget or {k: v for k, v in trainer.items() if k == "max_steps" and v not in (None, -1)}
        lines = {
            "run": str(self.run_dir),
            "family": self.resolved["model"]["class_path"],
            "data": str(self.resolved["data"].get("dataset", "digits")),
            "seed": str(self.seed),
            "budget": ", ".join(f"{k} = {v:g}" for k, v in limit.items()) or "none",
            "metrics": ", ".join(evaluator.get("metrics") or {}) or "none",
            "requires": ", ".join(f"{k} ({v.fingerprint})" for k, v in self.requirements.items()) or "nothing",
            "fingerprint": self.fingerprint,
        }
        return "\n".join(wrapped(value, f"{name:<12} ", " " * 13) for name, value in lines.items())

    def save(self, run_dir: Path) -> None:
        """Write ``config.source.yaml`` and ``config.yaml``, each atomically; call it on one process."""
        write_text(run_dir / "config.source.yaml", self.source_yaml)
        self.write(run_dir / "config.yaml")

    def write(self, path: Path) -> None:
        """Write the resolved configuration to a file, atomically."""
        write_text(path, to_yaml(self.resolved))

    def check_files(self) -> None:
        """Check that the user's own files hold what they held when the experiment was configured.

        Raises:
            ConfigError: one that does not, with the remedy.
        """
        check_files(self.resolved)

    def build_data(self) -> FlowDataModule:
        """The datamodule alone, seeded with the run's seed; it draws nothing from the global generators.

        Raises:
            ConfigError: see :meth:`check_files`.
        """
        self.check_files()
        return self._parts.data.build()

    def build_model(self, spec: DataSpec, **required: LightningModule) -> LightningModule:
        """The model alone, for data of a given specification; no seed is set and no data are read.

        Args:
            spec: shape, classes and value grid.
            required: a model for every name in ``requires``.
        """
        model: LightningModule = self._parts.model.build()(spec, **required)
        return model

    def build_evaluator(self) -> Evaluator | None:
        """The evaluator alone, None when the experiment has none."""
        return self._parts.evaluator.build() if self._parts.evaluator else None

    def build_trainer_parts(self) -> dict[str, Any]:
        """Arguments of the trainer, the callbacks among them; loggers only where they open nothing when they are built.

        Raises:
            ValueError: a class refuses its arguments.
        """
        return self._parts.build_trainer_parts()

    def build(self, checkpoints: Mapping[str, Path] | None = None, data: FlowDataModule | None = None) -> Built:
        """Seed, then build data, model, evaluator, callbacks and loggers, in this order.

        Args:
            checkpoints: for every name in ``requires`` the checkpoint file of that experiment. The model's
                argument of that name gets the path when it is annotated as one, else the trained model. What a
                required experiment requires itself goes by both names, ``teacher.autoencoder``; without its file the
                required model is built without it.
            data: what :meth:`build_data` gave before, so that the user's own are not read twice.

        Raises:
            ConfigError: a required checkpoint is not given, or one is given that nothing requires; see also
                :meth:`check_files`.
            ValueError: a class refuses its arguments.
        """
        given = {k: Path(v) for k, v in (checkpoints or {}).items()}
        for name in self.requirements.keys() - given.keys():
            raise ConfigError(f"requires.{name} has no checkpoint yet; run: flowbench prepare -c FILE")
        self.check_files()
        return self._parts.build(self._checkpoints(given), data)

    def _checkpoints(self, given: Mapping[str, Path]) -> dict[str, _Checkpoint]:
        """Files by requirement, those of a requirement's own requirements inside of it."""
        inner: dict[str, dict[str, Path]] = {name: {} for name in given if "." not in name}
        for name, path in given.items():
            first, dot, rest = name.partition(".")
            if first not in self.requirements or first not in inner:
                raise ConfigError(f"checkpoint '{name}' is given, but the experiment does not require it")
            if dot:
                inner[first][rest] = path
        needed = self.requirements
        return {k: _Checkpoint(needed[k], given[k], needed[k]._checkpoints(inner[k])) for k in inner}


@dataclass(frozen=True)
class _Checkpoint:
    """A required experiment, the checkpoint it left, and those of what it requires itself."""

    experiment: Experiment
    path: Path
    inner: dict[str, _Checkpoint]

    def load(self) -> LightningModule:
        """The trained model, with its averaged weights."""
        from flowbench.families.latents.autoencoder import load_trained

        parts = self.experiment._parts
        factory = parts.model.build()
        spec = self.experiment.build_data().spec
        return load_trained(factory(spec, **parts.required(self.inner)), self.path)


@dataclass(frozen=True)
class _Parts:
    """The validated sections, ready to build."""

    init_seed: int
    model: Object
    data: Arguments
    trainer: Arguments
    evaluator: Arguments | None
    callbacks: dict[str, Object]
    loggers: dict[str, Object]
    budget: dict[str, float] | None

    @classmethod
    def validate(cls, resolved: Mapping[str, Any], seed: int, run_dir: Path, required: tuple[str, ...]) -> _Parts:
        from lightning import Callback, LightningModule, Trainer
        from lightning.pytorch.loggers import Logger

        from flowbench.data import DataSpec, FlowDataModule

        trainer = _section(resolved, "trainer")
        check_trainer(trainer)
        budget = read_budget(resolved.get("budget"), trainer)
        data = _section(resolved, "data")
        if data.get("seed") is None:
            data["seed"] = seed
        data_arguments = Arguments("data", FlowDataModule, data)
        model = Object("model", Callable[[DataSpec], LightningModule], resolved["model"])
        _check_required(model.cls, resolved["model"], required)
        trainer_arguments = Arguments("trainer", Trainer, trainer)
        check_trainer_numbers(trainer_arguments.parsed)
        return cls(
            init_seed=read_seeds(resolved.get("seeds"), seed)["init"],
            model=model,
            data=data_arguments,
            trainer=trainer_arguments,
            evaluator=_evaluator(resolved.get("evaluator")),
            callbacks=_named(resolved, "callbacks", Callback, {}),
            loggers=_named(resolved, "loggers", Logger, {"save_dir": str(run_dir)}),
            budget=budget,
        )

    def build_trainer_parts(self) -> dict[str, Any]:
        from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

        # Others may talk to a service.
        local = [part for part in self.loggers.values() if issubclass(part.cls, CSVLogger | TensorBoardLogger)]
        for part in local:
            part.build()
        return {**self.trainer.values(), "callbacks": [part.build() for part in self.callbacks.values()]}

    def build(self, checkpoints: Mapping[str, _Checkpoint], data: FlowDataModule | None = None) -> Built:
        # Nothing may be built before the seed: initial weights are drawn in constructors.
        self._seed()
        datamodule = data or self.data.build()
        required = self.required(checkpoints)
        self._seed()  # so that a contender's initial weights do not depend on what its prerequisites drew
        model = self.model.build()(datamodule.spec, **required)
        return Built(
            datamodule=datamodule,
            model=model,
            trainer_arguments=self.trainer.values(),
            evaluator=self.evaluator.build() if self.evaluator else None,
            callbacks={name: part.build() for name, part in self.callbacks.items()},
            loggers={name: part.build() for name, part in self.loggers.items()},
            budget=self.budget,
        )

    def required(self, checkpoints: Mapping[str, _Checkpoint]) -> dict[str, LightningModule | str]:
        """The model's arguments of these names: trained models, or paths where it takes them."""
        hints = constructor_hints(self.model.cls)
        return {
            name: str(checkpoint.path) if takes_path(hints.get(name)) else checkpoint.load()
            for name, checkpoint in checkpoints.items()
        }

    def _seed(self) -> None:
        from lightning import seed_everything

        from flowbench.core.seeds import derive_seed

        seed_everything(derive_seed(self.init_seed, "init") % 2**32, verbose=False)  # Lightning takes 32 bits


def _check_sections(resolved: Mapping[str, Any]) -> None:
    for key in resolved:
        if key not in SECTIONS:
            raise ConfigError(f"unknown key '{key}' in the experiment{suggestion(str(key), SECTIONS)}")
    for key in ("data", "model"):
        if not resolved.get(key):
            raise ConfigError(f"the experiment has no '{key}'; see flowbench list experiments")
    run = resolved.get("run") or {}
    if not isinstance(run, Mapping):
        raise ConfigError(f"run must hold dir and name, got {shown(run)}")
    for key in run:
        if key not in RUN_KEYS:
            raise ConfigError(f"run: unknown key '{key}'{suggestion(str(key), RUN_KEYS)}")


def _seed(value: Any) -> int:
    try:
        check_seed("seed", value)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return int(value)


def _run_dir(run: Mapping[str, Any] | None, stem: str, name: str) -> Path:
    run = run or {}
    for key, value in run.items():
        if isinstance(value, (Mapping, list)):
            raise ConfigError(f"run.{key} must be text, got {shown(value)}")
    if run.get("dir"):
        return expand(run["dir"])
    if run.get("name"):
        if run["name"].startswith("~"):
            raise ConfigError(f"run.name={run['name']} names a folder inside of runs/; write run.dir={run['name']}")
        return Path("runs") / run["name"]
    return Path("runs") / (stem if stem.endswith(name) else f"{stem}-{name}")


def _requirement(name: str, resolved: dict[str, Any]) -> Experiment:
    try:
        experiment = Experiment._from_resolved(resolved, to_yaml(resolved), name)
        experiment.require_budget()
    except ConfigError as error:
        raise ConfigError(f"requires.{name}: {error}") from error
    return experiment


def _section(resolved: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    value = resolved.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}{key} must hold 'name: value' lines, got {shown(value)}")
    return dict(value)


def _check_required(cls: type, spec: Mapping[str, Any], required: Iterable[str]) -> None:
    accepted = accepted_names(cls)
    for name in required:
        if name not in accepted:
            hint = suggestion(name, accepted)
            raise ConfigError(
                f"requires.{name}: {cls.__name__} does not accept '{name}'{hint}; requires.{name}=null takes it out"
            )
        if (spec.get("init_args") or {}).get(name) is not None:
            raise ConfigError(
                f"model.init_args.{name} is given and required at once; keep it and add requires.{name}=null"
            )


def _evaluator(section: Any) -> Arguments | None:
    if section is None:
        return None
    from flowbench.evaluation import Evaluator

    # Not in the tree, whose fingerprint results of earlier versions have.
    if isinstance(section, Mapping) and isinstance(section.get("references") or {}, Mapping):
        section = {**section, "references": given_references(section)}
    return Arguments("evaluator", Evaluator, section)


def _named(resolved: Mapping[str, Any], key: str, base: type, defaults: Mapping[str, Any]) -> dict[str, Object]:
    """The objects of a named mapping; ``defaults`` fill arguments that a class accepts and is not given."""
    section = resolved.get(key) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{key} must be named: {key}: {{my_name: {{class_path: ...}}}}, got a {type(section).__name__}"
        )
    parts = {}
    for name, spec in section.items():
        if isinstance(spec, Mapping) and "class_path" in spec:
            accepted = accepted_names(import_class(f"{key}.{name}", spec["class_path"]))
            fill = {k: v for k, v in defaults.items() if k in accepted}
            given = _section(spec, "init_args", f"{key}.{name}.")
            spec = {**spec, "init_args": {**fill, **given}}
        parts[str(name)] = Object(f"{key}.{name}", base, spec)
    return parts
