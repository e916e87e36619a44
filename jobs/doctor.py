"""Is this machine, or every node of the cluster, fit for a run? `make doctor`; what is not is named with what to do."""

from geodistill.cli import JobFailed, main
from geodistill.config import Config


def doctor_job(config: Config) -> None:
    from geodistill.doctor import doctor_text, examine

    found = examine(config)
    print(f"\n{doctor_text(found)}\n")
    verdicts = [one.verdict for findings in found.values() for one in findings]
    if wrong := verdicts.count("wrong"):
        raise JobFailed(f"{wrong} of {len(verdicts)} checks found what will stop a run; mend that first")
    look = verdicts.count("look")
    print("fit for a run" + (f"; {look} of {len(verdicts)} checks found something to look at" if look else ""))


if __name__ == "__main__":
    main("doctor", doctor_job)
