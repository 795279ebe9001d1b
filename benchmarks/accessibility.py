"""Accessibility of a report's pages: axe-core in headless Chromium, at 1280 and at 390 pixels, on light and on dark screens.

    npm install --prefix /tmp/axe axe-core
    python benchmarks/accessibility.py reports/demo --axe /tmp/axe/node_modules/axe-core/axe.min.js

Prints the findings and fails where one is serious or critical. The pages allow no script, so it works on copies without that rule.
"""

import argparse
import base64
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM = (
    "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
)
CHROMIUM += " --disable-component-update --disable-sync --virtual-time-budget=600000 --dump-dom"
RUN = """<script>axe.run({resultTypes: ["violations"]}).then(found => {
  const said = found.violations.map(v => ({id: v.id, impact: v.impact, help: v.help, n: v.nodes.length,
    first: v.nodes.slice(0, 3).map(node => node.html.slice(0, 200) + " " + (node.any[0] || {}).message)}));
  document.documentElement.innerHTML = "<pre>AXE" + btoa(unescape(encodeURIComponent(JSON.stringify(said)))) + "AXE</pre>"; });
</script>"""


def check(page: Path, axe: str, width: int, dark: bool) -> list[dict[str, Any]]:
    """The findings on a page, all of its folded parts open."""
    text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page.read_text(encoding="utf-8"))
    text = text.replace("<details", "<details open").replace("</body>", f"<script>{axe}</script>{RUN}</body>")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(text, encoding="utf-8")
        command = [*CHROMIUM.split(), f"--user-data-dir={folder}/profile", f"--window-size={width},900"]
        command += ["--blink-settings=preferredColorScheme=0"] if dark else []
        done = subprocess.run([*command, copy.as_uri()], check=True, capture_output=True, text=True, timeout=600)
    if not (found := re.search("<pre>AXE([A-Za-z0-9+/=]*?)AXE</pre>", done.stdout)):
        raise SystemExit(f"{page}: axe did not end")
    return json.loads(base64.b64decode(found[1]))


def main() -> int:
    """Check all pages of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js")
    parser.add_argument("--quick", action="store_true", help="light at 1280 pixels only")
    args = parser.parse_args()
    axe, serious = args.axe.read_text(encoding="utf-8"), 0
    for page in sorted(args.folder.rglob("*.html")):
        for width, dark in [(1280, False)] if args.quick else [(w, d) for w in (1280, 390) for d in (False, True)]:
            findings = check(page, axe, width, dark)
            print(f"{page} {width} {'dark' if dark else 'light'}: {len(findings)} findings")
            for finding in findings:
                serious += finding["impact"] in ("serious", "critical")
                print(f"  {finding['impact']}: {finding['id']} ({finding['n']}): {finding['help']}")
                print("".join(f"    {node}\n" for node in finding["first"]), end="")
    return 1 if serious else 0


if __name__ == "__main__":
    sys.exit(main())
