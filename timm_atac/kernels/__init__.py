"""Operations of the unit that PyTorch has in no single public call, one a file, each equal to a plain formula."""
