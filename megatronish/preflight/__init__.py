"""Runs the trainer's own code as any rank of any job, without a GPU and without the job."""
