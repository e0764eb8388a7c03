"""TFX's Trainer, which also sees the catalogue and the user states, and exports warm-up requests too."""

from __future__ import annotations

from typing import Any, ClassVar

from tfx import types
from tfx.components.trainer import executor as trainer_executor
from tfx.components.trainer import fn_args_utils
from tfx.dsl.components.base import base_component, executor_spec
from tfx.proto import trainer_pb2
from tfx.types import artifact_utils, standard_artifacts, standard_component_specs
from tfx.types.component_spec import ChannelParameter
from tfx.utils import json_utils, path_utils

from schema.contract import dataset_spec_from_json
from tfx_pipeline.warmup import add_warmup_requests

_CATALOGUE = "catalogue"
_USER_STATES = "user_states"


class ModelTrainerSpec(standard_component_specs.TrainerSpec):
    """TrainerSpec with the catalogue and the user states as further inputs."""

    INPUTS: ClassVar[dict[str, ChannelParameter]] = {
        **standard_component_specs.TrainerSpec.INPUTS,
        _CATALOGUE: ChannelParameter(type=standard_artifacts.Examples),
        _USER_STATES: ChannelParameter(type=standard_artifacts.Examples),
    }


class ModelTrainerExecutor(trainer_executor.GenericExecutor):
    """Hands the file patterns of the further inputs to run_fn through `custom_config`."""

    def _GetFnArgs(self, input_dict: Any, output_dict: Any, exec_properties: Any) -> fn_args_utils.FnArgs:
        fn_args = super()._GetFnArgs(input_dict, output_dict, exec_properties)
        for name in (_CATALOGUE, _USER_STATES):
            uri = artifact_utils.get_split_uri(input_dict[name], name)
            fn_args.custom_config[name] = [f"{uri}/*.gz"]
        return fn_args

    def Do(self, input_dict: Any, output_dict: Any, exec_properties: Any) -> None:
        """Trains and exports, then adds warm-up requests of real users to the exported model."""
        super().Do(input_dict, output_dict, exec_properties)
        settings = json_utils.loads(exec_properties[standard_component_specs.CUSTOM_CONFIG_KEY])
        spec = dataset_spec_from_json(settings["dataset"])
        states_uri = artifact_utils.get_split_uri(input_dict[_USER_STATES], _USER_STATES)
        model_dir = path_utils.serving_model_dir(artifact_utils.get_single_uri(output_dict["model"]))
        add_warmup_requests(model_dir, settings["model_name"], [f"{states_uri}/*.gz"], spec)


class ModelTrainer(base_component.BaseComponent):
    """Trains and exports one model by a run function in the `trainer` package."""

    SPEC_CLASS = ModelTrainerSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(ModelTrainerExecutor)

    def __init__(
        self,
        run_fn: str,
        examples: types.BaseChannel,
        transform_graph: types.BaseChannel,
        catalogue: types.BaseChannel,
        user_states: types.BaseChannel,
        custom_config: dict[str, Any],
        base_model: types.BaseChannel | None = None,
    ) -> None:
        """Makes the component.

        Args:
          run_fn: dotted path of the run function.
          examples: raw interaction examples with splits train and eval.
          transform_graph: from Transform.
          catalogue: one example per item.
          user_states: one example per user.
          custom_config: JSON-able settings for the run function; "catalogue" and "user_states" are added.
          base_model: model to start from; may turn out to hold none.
        """
        spec = ModelTrainerSpec(
            examples=examples,
            transform_graph=transform_graph,
            catalogue=catalogue,
            user_states=user_states,
            base_model=base_model,
            train_args=trainer_pb2.TrainArgs(splits=["train"]),
            eval_args=trainer_pb2.EvalArgs(splits=["eval"]),
            run_fn=run_fn,
            custom_config=json_utils.dumps(custom_config),
            model=types.Channel(type=standard_artifacts.Model),
            model_run=types.Channel(type=standard_artifacts.ModelRun),
        )
        super().__init__(spec=spec)
