"""A page in a headless browser, as wide as a screen or a phone: what a script that is added to it tells."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""Chromium or Chrome; None where there is none."""
_FRAME = """<!DOCTYPE html><body><iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<script>
addEventListener("message", (event) => {{
  const shown = document.createElement("pre");
  shown.textContent = event.data;
  document.body.append(shown);
}});
</script>"""


def look(page: Path, script: str, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """What a script posts to the parent of a page.

    Args:
        page: HTML file; a copy with the script is written beside it.
        script: with its tags.
        folder: empty one, for the frame and the browser's profile.
        width: of the frame, in pixels; a window of a browser has a least width.
        dark: whether the page is asked for its dark colors.
    """
    assert BROWSER is not None
    probed, frame = page.with_name(f"probed-{page.name}"), folder / "frame.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{script}", 1), encoding="utf-8")
    frame.write_text(_FRAME.format(page=probed.as_uri(), width=width))
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--allow-file-access-from-files", "--window-size=1400,1000", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=8000", "--dump-dom", *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        frame.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    match = re.search(r"<pre>(.*?)</pre>", shown, flags=re.DOTALL)
    assert match, shown
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found
