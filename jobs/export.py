"""Write the student as others take it: merged weights, processor, model card, and smaller variants with what they lose."""

from geodistill.cli import main
from geodistill.config import Config


def export_job(config: Config) -> None:
    from geodistill.export import export, export_table

    print(f"\n{export_table(export(config))}\n\nmodels: {config.export.out}")


if __name__ == "__main__":
    main("export", export_job, needs_ray=lambda config: config.export.evaluate)
