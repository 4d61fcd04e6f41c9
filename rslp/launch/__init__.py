"""Stage 2: a job (what to execute) becomes a plan (exactly what is submitted), and a plan is submitted."""
