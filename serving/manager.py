"""All models of a server: which there are, which version a request means, and when to look for changes."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
from tensorflow_serving.apis import model_pb2

from schema.errors import BundleError, ConfigError, ServingError
from serving.config import ModelConfig, read_model_config
from serving.loader import LoadSettings, Model, VersionStatus
from serving.servable import Servable
from serving.status import RequestError, invalid_argument, not_found
from trainer.fingerprint import check_together

logger = logging.getLogger(__name__)


class ModelManager:
    """The models of a server by name, and the threads that look for new versions and a new config.

    Args:
      settings: how versions are loaded.
      allow_labels_before_loading: whether a new version label may name a version that is not loaded yet.
    """

    def __init__(
        self, settings: LoadSettings | None = None, *, allow_labels_before_loading: bool = False
    ) -> None:
        self._settings = settings or LoadSettings()
        self._allow_labels_before_loading = allow_labels_before_loading
        # Replaced whole: requests read them without a lock.
        self._models: dict[str, Model] = {}
        self._successors: dict[str, Model] = {}  # at a new base path, until a version of it is loaded
        self._configs: dict[str, ModelConfig] = {}
        self._is_mixed = False  # whether the newest versions are of different releases, as the log tells it
        self._loading = threading.Lock()  # one thread at a time loads and unloads
        self._closing = threading.Event()

    def load(self, configs: Mapping[str, ModelConfig], *, check_labels: bool = True) -> None:
        """Loads the models of a config and unloads all others; what serves goes on serving meanwhile.

        Args:
          configs: by model name.
          check_labels: False for a config that has held before, whose labels may name versions yet to load.

        Raises:
          RequestError: FAILED_PRECONDITION for a version label of a version that is not loaded: nothing has
            changed. UNKNOWN for a model without a version that loads, or whose folder cannot be read: the
            config holds from now on; that model serves what it did, if anything, and is tried again when its
            time has come.
        """
        with self._loading:
            if check_labels:
                self._check_labels(configs)
            models: dict[str, Model] = {}
            successors: dict[str, Model] = {}
            unwanted: list[tuple[Model, set[int]]] = []
            failures: list[str] = []
            for name, config in configs.items():
                old, model = self._models.get(name), self._model_at(config)
                try:
                    unwanted.append((model, model.load(config.policy)))
                    failures += _why_none_is_loaded(model, config)
                except OSError as error:
                    logger.exception("cannot look for versions model=%s path=%s", name, config.base_path)
                    failures.append(f"model {name!r}: {config.base_path} cannot be read: {error}")
                if old is not None and old.versions() and not model.versions():
                    models[name], successors[name] = old, model
                else:
                    models[name] = model
            for name, model in (models | successors).items():
                model.config = configs[name]
            self._models, self._successors, self._configs = models, successors, dict(configs)
            for model, versions in unwanted:  # not before: the old labels name them
                model.unload(versions)
            self._check_together()
        if failures:
            raise RequestError(grpc.StatusCode.UNKNOWN, " ".join(failures))

    def start_polling(self, wait_s: float) -> None:
        """Looks for new versions every `wait_s` seconds; never, when that is not positive."""
        self._start("version-poller", wait_s, self._refresh)

    def start_polling_config(self, path: Path, wait_s: float) -> None:
        """Reads the `models.config` again every `wait_s` seconds; never, when that is not positive."""
        self._start("config-poller", wait_s, lambda: self._reload(path))

    def close(self) -> None:
        """Stops looking for changes."""
        self._closing.set()

    def servable(self, spec: model_pb2.ModelSpec) -> Servable:
        """Returns the version that a request's `model_spec` asks for.

        Raises:
          RequestError: INVALID_ARGUMENT for a spec without name or with an unknown label, NOT_FOUND if not
            loaded.
        """
        model = self._model(spec.name)
        return model.servable(_version_of(spec, model))

    def statuses(self, spec: model_pb2.ModelSpec) -> dict[int, VersionStatus]:
        """Returns the state of the versions asked for, newest first.

        Raises:
          RequestError: INVALID_ARGUMENT for a spec without name or with an unknown label, NOT_FOUND for an
            unknown model or version.
        """
        model = self._model(spec.name)
        statuses = model.statuses()
        if (successor := self._successors.get(spec.name)) is not None:
            statuses = _with_successor(statuses, successor.statuses())
        if not statuses:
            raise not_found(f"Could not find any versions of model {spec.name}")
        version = _version_of(spec, model)
        if version is None:
            return statuses
        if version not in statuses:
            raise not_found(f"Could not find version {version} of model {spec.name}")
        return {version: statuses[version]}

    def is_served(self, name: str) -> bool:
        """Whether there is a model of that name."""
        return name in self._models

    def serving_versions(self) -> list[tuple[str, int]]:
        """Returns (model name, version) of what answers a request without version."""
        return [
            (name, max(versions)) for name, model in self._models.items() if (versions := model.versions())
        ]

    def _model_at(self, config: ModelConfig) -> Model:
        """Returns the model at the base path of a config: the known one, or a new one."""
        for models in (self._successors, self._models):
            model = models.get(config.name)
            if model is not None and model.config.base_path == config.base_path:
                return model
        return Model(config, self._settings)

    def _model(self, name: str) -> Model:
        if not name:
            raise invalid_argument("model_spec has no model name")
        models = self._models
        if name not in models:
            raise not_found(f"Servable not found: no model {name}; served: {', '.join(sorted(models))}")
        return models[name]

    def _check_labels(self, configs: Mapping[str, ModelConfig]) -> None:
        for name, config in configs.items():
            model = self._models.get(name)
            loaded = self._model_at(config).versions()  # not those of the base path before
            old_labels = model.config.labels if model else {}
            for label, version in config.labels.items():
                moves = old_labels.get(label, version) != version
                if version not in loaded and (moves or not self._allow_labels_before_loading):
                    raise RequestError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"Request to assign label {label} to version {version} of model {name}, which is not "
                        f"loaded from {config.base_path}; load the version first, or set "
                        f"--allow_version_labels_for_unavailable_models for labels not in use yet",
                    )

    def _start(self, name: str, wait_s: float, look: Callable[[], None]) -> None:
        def run() -> None:
            while not self._closing.wait(wait_s):
                try:
                    look()
                except Exception:  # without its thread the server would never look again, and not tell
                    logger.exception("%s failed, looks again in %g s", name, wait_s)

        if wait_s > 0:
            threading.Thread(target=run, name=name, daemon=True).start()

    def _refresh(self) -> None:
        with self._loading:
            for model in (*self._models.values(), *self._successors.values()):
                try:
                    model.refresh()
                except OSError:  # a folder that is being replaced while it is read; the next look may succeed
                    logger.exception(
                        "cannot look for versions model=%s path=%s", model.name, model.config.base_path
                    )
            loaded = {name: model for name, model in self._successors.items() if model.versions()}
            if loaded:
                self._models = self._models | loaded
                self._successors = {n: model for n, model in self._successors.items() if n not in loaded}
            self._check_together()

    def _check_together(self) -> None:
        """Warns when the newest versions of the bundles cease to be of one release.

        They are served all the same: while a release is pushed, one bundle after the other, that is so for a
        moment, and a server may have models of several products.
        """
        fingerprints = {
            name: fingerprint
            for name, version in self.serving_versions()
            if (fingerprint := self._models[name].servable(version).fingerprint) is not None
        }
        try:
            check_together(fingerprints)
        except BundleError as error:
            if not self._is_mixed:
                logger.warning("mixed releases: %s", error)
            self._is_mixed = True
        else:
            if self._is_mixed:
                logger.info("the bundles belong together again")
            self._is_mixed = False

    def _reload(self, path: Path) -> None:
        try:
            configs = read_model_config(path)
            if configs != self._configs:
                self.load(configs)
                logger.info("reloaded path=%s models=%s", path, ",".join(configs))
        except (ConfigError, ServingError) as error:
            logger.error("cannot take over all of %s, serving=%s: %s", path, self.serving_versions(), error)


def _why_none_is_loaded(model: Model, config: ModelConfig) -> list[str]:
    if model.versions():
        return []
    return [f"model {model.name!r}: no version under {config.base_path} can be loaded: {model.failures()}"]


def _with_successor(
    statuses: dict[int, VersionStatus], successor: dict[int, VersionStatus]
) -> dict[int, VersionStatus]:
    """Adds the states at a new base path; a version that is in both keeps its state, with the error."""
    merged = successor | {
        version: dataclasses.replace(successor.get(version, status), state=status.state)
        for version, status in statuses.items()
    }
    return dict(sorted(merged.items(), reverse=True))


def _version_of(spec: model_pb2.ModelSpec, model: Model) -> int | None:
    choice = spec.WhichOneof("version_choice")
    if choice == "version_label":
        if spec.version_label not in model.config.labels:
            raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
        return model.config.labels[spec.version_label]
    return spec.version.value if choice == "version" else None
