"""What an operator of the endpoint can set."""

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """What `serve run serving.app:build KEY=VALUE ...` and args: in a Serve config take."""

    model_config = ConfigDict(extra="forbid")

    student: str = Field(description="folder of the student, as jobs/distill.py wrote it")
    teacher: str = Field("", description="folder of a teacher to be served beside it, for comparison")
    replicas: int = Field(1, ge=0, description="replicas of each model at least")
    max_replicas: int = Field(0, ge=0, description="and at most, as the queue asks for; 0: as many as at least")
    cpus: float = Field(0.5, gt=0, description="CPUs of a replica [Ray's accounting]")
    gpus: float = Field(0, ge=0, description="GPUs of a replica; 0: it runs on the CPU")
    threads: int = Field(1, ge=1, description="threads of a replica on the CPU")
    surge: int = Field(
        0,
        ge=0,
        le=100,
        description="percent of its replicas that start beside the old ones where a student is replaced",
    )
    image_size: int = Field(0, ge=0, description="pixels that images are brought to, as in training; 0: what the tower sees")
    batch: int = Field(32, ge=1, description="requests that a replica answers together")
    queue: int = Field(64, ge=0, description="requests that may wait; more get 429 with Retry-After")
    timeout: float = Field(60, gt=0, description="seconds that an answer may take, else 504")
    max_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    max_body_mb: float = Field(32, gt=0, description="size of a request [MiB]")
    max_scene_mb: float = Field(1024, gt=0, description="size of a whole scene [MiB]")
    max_tiles: int = Field(50_000, ge=1, description="of a scene")
    needs_token: bool = Field(False, description="set by itself where GEODISTILL_API_TOKEN is")
    max_pixels: int = Field(50_000_000, ge=1, description="of an image, before it is decoded")
    image_hosts: list[str] = Field(
        [], description="hosts (host or host:port) that image_url may name by http(s); none: data URLs alone"
    )
    prefix_mb: int = Field(1024, ge=0, description="memory of a replica for images that were asked about before [MiB]")
    angle_counter_clockwise: bool = Field(True, description="sign of theta in the box text")
