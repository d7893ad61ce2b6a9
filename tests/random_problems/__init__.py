"""Small random models, losses, batches and options: `blockhess.spectrum` must give their Hessians' spectra, or refuse.

python -m tests.random_problems --draws 2000
"""
