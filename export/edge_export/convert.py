"""A Hugging Face checkpoint becomes a folder that `edge_runtime` loads."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

from edge_export.quiet import quiet
from edge_runtime.manifest import MODEL_NAME, Manifest, read_json


def export_model(source: str | Path, output: Path, *, weights: str = "int8") -> None:
    """Convert `source` into the model folder `output`."""
    source = Path(source)
    with quiet():
        import openvino as ov
        from optimum.exporters.openvino import model_configs
        from optimum.exporters.openvino.convert import export_from_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model_configs.GemmaOpenVINOConfig.MAX_TRANSFORMERS_VERSION = None
        work = output.with_name(output.name + ".work")
        model = AutoModelForCausalLM.from_pretrained(source)
        export_from_model(model, work, task="text-generation-with-past", stateful=True, preprocessors=[])
        ir = ov.Core().read_model(work / MODEL_NAME)
        del ir.get_rt_info()["runtime_options"]
        output.mkdir(parents=True)
        ov.save_model(ir, output / MODEL_NAME, compress_to_fp16=weights == "fp16")
        AutoTokenizer.from_pretrained(source).save_pretrained(output)
    del ir
    shutil.rmtree(work)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, output / name)
    config = read_json(source / "config.json")
    Manifest(
        architecture=config["model_type"],
        context_length=config.get("max_position_embeddings") or config.get("n_positions"),
        vocab_size=config["vocab_size"],
        eos_token_ids=(config["eos_token_id"],),
        bos_token_id=config.get("bos_token_id"),
        weights=weights,
        num_parameters=sum(p.numel() for p in model.parameters()),
        source=source.name,
        versions={"openvino": version("openvino")},
    ).save(output)
