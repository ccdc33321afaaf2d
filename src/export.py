"""Export a run: `python src/export.py ckpt=<run directory> to=safetensors|timm|hub|onnx|torch_export`."""

from vitrail_runtime.programs import run_program

if __name__ == "__main__":
    run_program("export")
