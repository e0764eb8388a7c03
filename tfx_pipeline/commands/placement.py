"""`funnel audit-placement`: what of an exported model a GPU could run."""

from __future__ import annotations

from pathlib import Path

import click

from tfx_pipeline.commands.common import CONSOLE


@click.command("audit-placement")
@click.option(
    "--model-dir",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Version folder of a pushed bundle.",
)
@click.option("--all", "show_all", is_flag=True, help="Also list the operations that have GPU kernels.")
def audit_placement(model_dir: Path, show_all: bool) -> None:
    """List the operations of a bundle that no GPU could run, and the share of its arithmetic on a GPU.

    Walks every function that a signature reaches, and asks the installed TensorFlow which kernels it has.
    Needs no GPU: arithmetic is counted while the CPU answers a golden request of the bundle.

    \b
    Examples:
      funnel audit-placement --model-dir runs/default/serving_models/ranking/1795872545
    """
    from tfx_pipeline.console import quiet_libraries

    quiet_libraries(None)
    from serving.placement import PRODUCTS, audit

    for placement in audit(model_dir):
        CONSOLE.print(f"{placement.bundle} / {placement.signature}", style="bold")
        total = sum(op.flops for op in placement.ops)
        CONSOLE.print(
            f"  {total / 1e6:,.2f} MFLOP in a golden request, {placement.gpu_share():.1%} of them on a GPU; "
            f"matrix products {placement.gpu_share(PRODUCTS):.1%}",
            soft_wrap=True,
        )
        for op in placement.ops:
            if show_all or not op.has_gpu_kernel:
                CONSOLE.print(
                    f"  {op.op:<28} {op.nodes:>5} nodes, {op.gpu_nodes:>5} with a GPU kernel, "
                    f"{op.flops / 1e6:>10,.3f} MFLOP",
                    soft_wrap=True,
                )
