"""A report comes back from its JSON as it was."""

import json

from slimlab.slim.report import Measured, SlimReport, Spread, Stage


def test_a_report_is_read_back_as_it_was_written():
    speed = Spread.of([1.0, 3.0, 2.0])
    side = Measured(9, 40, 50, 36, 1.5, speed, speed)
    stages = (Stage("original", 9, 40, 1.5, 0.0), Stage("as written", 9, 20, 1.7, 0.1))
    report = SlimReport(
        source="book",
        out="small",
        config={"quantize": "int8"},
        text={"name": "text"},
        original=side,
        slim=Measured(9, 20, 30, 10, 1.7, speed, speed),
        stages=stages,
        reading_ratio=speed,
        writing_ratio=speed,
        machine={"threads": 1},
        notes=("a note",),
    )
    stored = json.loads(json.dumps(report.as_dict()))
    assert SlimReport.from_dict(stored) == report
    assert stored["weights_ratio"] == 0.5
