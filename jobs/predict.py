"""Look for objects in whole scenes (predict.scenes: a GeoTIFF, a folder of them, or s3://), and write them as GeoJSON.

For each scene NAME.geojson in longitude and latitude, and NAME.scene.geojson in its own coordinates. An interrupted job goes on
with the same command.
"""

from geodistill.cli import main
from geodistill.config import Config


def predict_job(config: Config) -> None:
    from geodistill.predict import predict, predict_table

    print(f"\n{predict_table(predict(config))}\n\nfiles: {config.predict.out}")


if __name__ == "__main__":
    main("predict", predict_job)
