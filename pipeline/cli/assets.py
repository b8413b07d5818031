"""`headcast assets`: models and sample clips, listed or fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro

from pipeline.cli.common import Answer, Common
from pipeline.errors import UserError


@dataclass(frozen=True)
class Assets(Common):
    """List the models and sample clips with their licences, or fetch them ahead of time for an offline site."""

    action: tyro.conf.Positional[Literal["list", "fetch"]] = "list"
    """list them, or fetch what is missing."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only these; by default all that a run or the tests need (LPIPS's weights, VGG16 and MediaPipe for browsers, which
    comes with npm, only when named)."""

    def answer(self) -> Answer:
        from pipeline.assets import ensure_assets, list_assets
        from pipeline.heads import list_heads
        from pipeline.progress import default_reporter

        assets = list_assets()
        known = {asset["name"] for asset in assets}
        unknown = sorted(set(self.names) - known)
        if unknown:
            raise UserError(f"There is no asset '{unknown[0]}'.", f"choose from: {', '.join(sorted(known))}")
        if self.action == "fetch":
            ensure_assets(set(self.names) or {a["name"] for a in assets if not a["on_request"]}, default_reporter())
        rows = [asset for asset in list_assets() if not self.names or asset["name"] in self.names]
        lines = [_asset_lines(asset) for asset in rows if not asset["matting"]]
        networks = [_asset_lines(asset) for asset in rows if asset["matting"]]
        if networks:
            lines += ["", "Matting networks for --set matte.model=NAME, fetched when one is chosen:", *networks]
        heads = [] if self.names else list_heads()
        if heads:
            lines += ["", "Head models for --head that you bring yourself (anny comes with headcast):"]
            lines += [
                f"{h['name']:<21}{h['state']:<9}  {h['licence']}\n    {h['path']}, from {h['page']}" for h in heads
            ]
        return {"schema": 1, "assets": rows, "heads": heads}, "\n".join(lines), 0


def _asset_lines(a: dict[str, Any]) -> str:
    size = f"{a['size'] / 1e6:>7.1f}" if a["size"] % 1_000_000 else f"{a['size'] // 1_000_000:>5}  "
    return f"{a['name']:<22}{a['state']:<9}{size} MB  {a['licence']}\n    {a['about']}; {a['path']}"


def _head_lines(h: dict[str, Any]) -> str:
    return f"{h['name']:<21}{h['state']:<9}  {h['licence']}\n    {h['path']}, from {h['page']}"
