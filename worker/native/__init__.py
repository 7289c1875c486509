"""Operations of a decode step on a CPU in C++, compiled for this machine at start-up where it has a compiler."""
