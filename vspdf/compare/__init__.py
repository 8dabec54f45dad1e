"""Arms over seeds: a study is defined, tuned, run and told apart where its arms differ."""
