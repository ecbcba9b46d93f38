// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// StartInstance has the project's set-up start a private containerd and
// cohortd, everything of theirs below dir, and sets this process's environment
// for it. Tools and images must have been set up, and the programs built. stop
// ends it with all its containers; it is to be called also after an error.
func StartInstance(ctx context.Context, dir string) (stop func(context.Context) error, err error) {
	root, err := ProjectRoot()
	if err != nil {
		return func(context.Context) error { return nil }, err
	}
	stop = func(ctx context.Context) error {
		_, err := run(ctx, []string{filepath.Join(root, "contrib/setup/down.sh"), "--run", dir}, nil)
		return err
	}
	exports, err := run(ctx, []string{filepath.Join(root, "contrib/setup/up.sh"), "--run", dir}, nil)
	if err != nil {
		return stop, err
	}
	return stop, ApplyExports(exports)
}

// ProjectRoot is the nearest folder, from the working one upwards, that has a
// Makefile beside a go.mod.
func ProjectRoot() (string, error) {
	from, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := from; ; dir = filepath.Dir(dir) {
		_, noModule := os.Stat(filepath.Join(dir, "go.mod"))
		_, noMakefile := os.Stat(filepath.Join(dir, "Makefile"))
		if errors.Join(noModule, noMakefile) == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is not in the project's folder: go there, or set CONTAINERD_ADDRESS", from)
		}
	}
}
