"""Prepare the demo: SmolLM2-135M-Instruct and a federation of eight clients, from registry packages into a cache.

Usage: python launch/prepare_demo.py [--cache DIR]
A second call verifies what is there (about a second); what is missing or damaged is made again.
"""

import argparse
import logging
import shutil
import sys
import time
from pathlib import Path

from dpa_ds.demo import archives
from dpa_ds.demo import federation as demo
from dpa_ds.demo.tasks import SMOLLM2, SMOLLM2_GGUF_SHA256, SMOLLM2_MEMBER
from dpa_ds.errors import DataError, DpaError

DEFAULT_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "demo"
MODEL_NAME = "SmolLM2-135M-Instruct"
NOTICE = (
    "SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0 (GGUF field general.license; text in LICENSE).\n"
    f"De-quantised from {SMOLLM2_MEMBER} in {SMOLLM2.package} {SMOLLM2.version} (Apache-2.0).\n"
)

logger = logging.getLogger("prepare_demo")


def main() -> int:
    """Exit status 0, or that of the error that was printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for model and data (%(default)s)")
    cache = parser.parse_args().cache.expanduser()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    start = time.monotonic()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        model_dir = prepare_model(cache)
        federation_dir = demo.build_federation(cache / "federation", cache / "archives")
    except DpaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    logger.info("ready after %.1f s; nothing to do where no step is named above", time.monotonic() - start)
    logger.info("model       %s (%.0f MB), Apache-2.0: NOTICE", model_dir, _megabytes(model_dir))
    logger.info(
        "federation  %s (%.1f MB), licences: %s", federation_dir, _megabytes(federation_dir), demo.LICENSES_NAME
    )
    logger.info("whole cache %s (%.0f MB); archives/ spares the network next time", cache, _megabytes(cache))
    return 0


def prepare_model(cache: Path) -> Path:
    """Directory of the converted model in `cache`. Raises DpaError where something else stands in its place."""
    model_dir = cache / MODEL_NAME
    if archives.verified_manifest(model_dir) is not None:
        return model_dir
    if model_dir.exists() and not (model_dir / archives.MANIFEST_NAME).is_file():
        raise DataError(f"{model_dir} was not made by this command: move it away, or give another --cache")
    archives_dir, gguf_path = cache / "archives", cache / Path(SMOLLM2_MEMBER).name
    archives.extract_member(SMOLLM2, SMOLLM2_MEMBER, SMOLLM2_GGUF_SHA256, gguf_path, archives_dir)
    logger.info("converting %s", gguf_path.name)
    # Only here: it imports torch and transformers, which takes longer than verifying a cache that is complete.
    from dpa_ds.model.gguf.convert import convert_gguf

    partial_dir = cache / f".{MODEL_NAME}.part"
    shutil.rmtree(partial_dir, ignore_errors=True)
    convert_gguf(gguf_path, partial_dir)
    (partial_dir / "NOTICE").write_text(NOTICE, encoding="utf-8")
    (licence,) = archives.read_members(archives.obtain(SMOLLM2, archives_dir), SMOLLM2.licence_member)
    (partial_dir / "LICENSE").write_bytes(licence)
    archives.write_manifest(partial_dir, {"gguf_sha256": SMOLLM2_GGUF_SHA256})
    shutil.rmtree(model_dir, ignore_errors=True)
    partial_dir.rename(model_dir)
    return model_dir


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
