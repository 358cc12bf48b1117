"""`--config FILE`: options from a file, in front of those of the command line."""

import pytest

from fuse.cli import main
from fuse.options_file import with_config_file


def test_options_come_before_those_of_the_command_line(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("seed: 1\nnames: [a, -b]\nquiet: true\nbf16: false\nnothing:\nsft: {learning_rate: 1.0e-4}\n")
    given = ["--config", str(file), "--seed", "2"]
    assert with_config_file(given) == [
        *("--seed=1", "--names", "a", "-b", "--quiet", "--bf16=false", "--sft.learning_rate=0.0001"),
        *given,
    ]
    assert with_config_file(["--seed", "2"]) == ["--seed", "2"]


@pytest.mark.parametrize(
    ("text", "reason"), [("- a\n", "holds no mapping"), ("a: [", "cannot be read"), ("1: 2", "holds no mapping")]
)
def test_another_file_is_refused(tmp_path, text, reason):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        with_config_file([f"--config={file}"])
    with pytest.raises(ValueError, match="cannot be read"):
        with_config_file(["--config", str(tmp_path / "none.yaml")])


def test_commands_take_it(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(f"actor-stages: 2\nactor-microbatches: 2\njson: {tmp_path / 'result.json'}\n")
    assert main(["solve", "--config", str(file), "--time-limit", "1", "--workers", "1"]) == 0
    assert (tmp_path / "result.json").exists()
    file.write_text("actor-stage: 2\n")
    with pytest.raises(SystemExit, match="2"):
        main(["solve", "--config", str(file)])
    assert "unknown option --actor-stage" in capsys.readouterr().err
