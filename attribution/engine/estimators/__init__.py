"""One file per method, one signature: `score(task, ...) -> (n_train, n_query)`, positive = helpful."""
