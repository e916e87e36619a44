"""Distil with other settings side by side (sweep.space), and leave the best model in run/sweep/best, ready to serve.

Data and teacher are those of the run. An interrupted sweep goes on with the same command, trials that ran from their last
checkpoints. sweep.serve=true then serves the best
student beside its teacher, as `serve run serving.app:build` does, until Ctrl-C.
"""

from contextlib import suppress

from geodistill.cli import JobFailed, main
from geodistill.config import Config


def sweep_job(config: Config) -> None:
    from geodistill.data.files import open_folder, write_text
    from geodistill.sweep import sweep, sweep_table

    found = sweep(config)
    folder = f"{config.run}/sweep"
    write_text(open_folder(folder), "table.txt", sweep_table(found))
    print(f"\n{sweep_table(found)}\n\nfigures: {folder}/sweep.json, {folder}/sweep.png")
    if not found["best"]:
        raise JobFailed(f"no trial was finished; the first of the table {found['trials'][0]['state']}")
    if config.sweep.serve:
        from ray import serve

        from serving.app import Settings, build

        serve.start(http_options={"host": "127.0.0.1", "port": config.sweep.port})
        with suppress(KeyboardInterrupt):
            serve.run(build(Settings(student=found["best"], teacher=config.distill.teacher)), blocking=True)


if __name__ == "__main__":
    main("sweep", sweep_job)
