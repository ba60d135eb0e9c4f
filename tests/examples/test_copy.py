"""The GPT trainer's core, copied to a new folder as docs/trainer/index.md describes."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from gpt_runs import ROOT, TEXT


@pytest.mark.slow
def test_copied_core_folder_trains_a_modified_model_without_examples(tmp_path):
    shutil.copytree(ROOT / "examples" / "gpt" / "core", tmp_path / "my_gpt")
    model = tmp_path / "my_gpt" / "model.py"
    changed = model.read_text().replace("jax.nn.gelu(up)", "jax.nn.relu(up) ** 2")
    assert changed != model.read_text()
    model.write_text(changed)
    (tmp_path / "my_text.txt").write_text(TEXT)
    page = (ROOT / "docs" / "trainer" / "index.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    code = 'import sys; sys.modules["examples"] = None\n' + code
    result = subprocess.run(
        [sys.executable, "-c", code.replace("steps=200", "steps=20")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    [loss] = re.findall(r"val_loss (\d\.\d+)", result.stdout)
    assert float(loss) < 5
