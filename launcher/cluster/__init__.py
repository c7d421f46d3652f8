"""Jobs on a cluster: what `ghostmask submit` hands over, what a job does there, and what became of it.

options.py  what is asked of the cluster, and the site's defaults
snapshot.py the code that a job runs, copied into its run folder
submit.py   from configurations to jobs, through submitit
job.py      what every task of a job does
ended.py    the last line of a job's script: is it started again?
record.py   the files that tell of it: RUN/job.json, RUN/job/attempts.jsonl
slurm.py    what Slurm itself says of a job
status.py   `ghostmask status`, cancel and logs
"""
