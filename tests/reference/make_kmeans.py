"""Prints SKLEARN_INERTIA of tests/test_prompts.py.

Made with scikit-learn 1.9.1, numpy 2.4.6:  PYTHONPATH=.:tests python tests/reference/make_kmeans.py
"""
from sklearn.cluster import KMeans

from test_prompts import reference_data

for kind in ("blobs", "noise"):
    fit = KMeans(12, n_init=10, random_state=0).fit(reference_data(kind))
    print(f'"{kind}": {fit.inertia_:.2f}')
