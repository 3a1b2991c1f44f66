"""`make gpu-check OUT=dir`: tests, benchmarks and tuning on one GPU, in which no hang, crash or cut-off loses a finished row.

A row is a test, a benchmark, a tuning candidate or a measurement of the machine. Each is written to ``rows.jsonl`` as it begins and
as it finishes; everything else in the folder is computed from that file.

    rows.py        the lines of rows.jsonl, and how they add up
    recorder.py    the pytest plugin that writes them for tests and benchmarks
    supervisor.py  runs a process, kills a row that hangs, and starts a new process for the rows that remain
    stages.py      what is run, in which order, and how long each may take
    measure.py     what environment.json and profile.json hold, in a process of its own
    wheels.py      puts the wheels that `make gpu-wheels` collected on the path
    results.py     tests.json, benchmarks.json, environment.json and profile.json, from the rows
    summary.py     summary.txt: the targets, each met or missed by how much, and every row that was lost
    cli.py         the command line

This package needs nothing but the standard library, except where the measured process imports torch.
"""
