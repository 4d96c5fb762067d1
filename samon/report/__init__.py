"""`samon-report`: one page of figures and tables from runs, sweeps and evaluations."""
