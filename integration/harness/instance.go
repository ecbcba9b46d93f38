// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/cohort-project/cohort/integration/shop/harness"
)

// Instance is a private containerd with its cohortd. It may be used
// concurrently.
type Instance struct {
	// Dir is the folder that holds all of it.
	Dir string
	// Address is containerd's socket; State and Root are COHORT_STATE and
	// COHORT_ROOT of its shims and its cohortd.
	Address, State, Root string
	// Env is the environment in which ctr, cohort and the tools find the
	// instance, as os.Environ has it.
	Env []string

	tag    string
	names  atomic.Uint64
	client func() (*containerd.Client, error)
	end    func() error
}

// limit is the longest that starting or ending an instance may take.
const limit = 3 * time.Minute

var (
	mu     sync.Mutex
	shared *Instance
	failed error
)

// Main runs a binary's tests and ends the instance that they shared. It returns
// the exit code.
func Main(m *testing.M) int {
	code := m.Run()
	mu.Lock()
	defer mu.Unlock()
	if shared == nil {
		return code
	}
	if err := shared.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "ending the tests' containerd:", err)
		return max(code, 1)
	}
	return code
}

// Up returns the instance that all tests of the binary share, and checks when
// the test is over that it left nothing behind. The test is skipped if there can
// be none, see Require.
func Up(t *testing.T) *Instance {
	t.Helper()
	RequireRoot(t)
	in, err := Shared()
	var missing missingError
	if errors.As(err, &missing) {
		Require(t, false, string(missing))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.CheckClean(t) })
	return in
}

// Shared is Up for who has no test at hand. This process's environment is
// changed to that of the instance, so that ctr and cohort find it.
func Shared() (*Instance, error) {
	mu.Lock()
	defer mu.Unlock()
	if shared != nil || failed != nil {
		return shared, failed
	}
	// One failure to start is told by each test, not tried again by each.
	shared, failed = start()
	return shared, failed
}

func start() (*Instance, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if dir := os.Getenv("COHORT_TEST_RUN"); dir != "" {
		return use(ctx, dir)
	}
	in, err := Start(ctx, "test")
	if err != nil {
		return nil, err
	}
	return in, in.enter()
}

// use is the instance in dir, which somebody else started and will end.
func use(ctx context.Context, dir string) (*Instance, error) {
	out, err := script(ctx, nil, "env.sh", "--run", dir)
	if err != nil {
		return nil, err
	}
	in, err := newInstance(dir, out)
	if err != nil {
		return nil, err
	}
	in.end = func() error { return nil }
	if _, err := in.Ctr(ctx, "version"); err != nil {
		return nil, fmt.Errorf("no containerd answers in COHORT_TEST_RUN=%s: %w", dir, err)
	}
	return in, in.enter()
}

// Start starts an instance of its own, for tests that need a second one; Close
// ends it. name is part of its folder's name.
func Start(ctx context.Context, name string) (*Instance, error) {
	root, err := projectDir()
	if err != nil {
		return nil, err
	}
	for _, tool := range []string{"containerd", "ctr", "runc", "criu"} {
		if path := filepath.Join(toolsDir(root), "bin", tool); !executable(path) {
			return nil, missingError(path + " (make setup)")
		}
	}
	for _, program := range []string{"cohortd", "cohort", "containerd-shim-cohort-v2"} {
		if path := filepath.Join(root, "bin", program); !executable(path) {
			return nil, missingError(path + " (make build)")
		}
	}
	removeStale(ctx, root)
	// The folder's name is short: a socket's path below it has 107 bytes at most.
	dir := filepath.Join(root, fmt.Sprintf(".run-%s-%d-%s", name, os.Getpid(), randomTag()[:3]))
	// containerd unpacks a checkpoint into a temporary folder for each task that it
	// restores by itself, and leaves it: that has to go with the instance.
	temp := filepath.Join(dir, "tmp")
	if err := os.MkdirAll(temp, 0o711); err != nil {
		return nil, err
	}
	out, err := script(ctx, []string{"TMPDIR=" + temp}, "up.sh", "--run", dir)
	if err != nil {
		_, downErr := script(context.WithoutCancel(ctx), nil, "down.sh", "--run", dir)
		return nil, errors.Join(err, downErr)
	}
	in, err := newInstance(dir, out)
	if err != nil {
		return nil, err
	}
	in.end = sync.OnceValue(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		_, err := script(ctx, nil, "down.sh", "--run", dir)
		return err
	})
	return in, nil
}

// newInstance reads what up.sh or env.sh printed.
func newInstance(dir, exports string) (*Instance, error) {
	env, err := exported(exports)
	if err != nil {
		return nil, err
	}
	in := &Instance{Dir: dir, Env: env, tag: randomTag()}
	for name, field := range map[string]*string{"CONTAINERD_ADDRESS": &in.Address, "COHORT_STATE": &in.State, "COHORT_ROOT": &in.Root} {
		if *field = lookup(env, name); *field == "" {
			return nil, fmt.Errorf("the set-up printed no %s", name)
		}
	}
	in.client = sync.OnceValues(func() (*containerd.Client, error) {
		return containerd.New(in.Address, containerd.WithDefaultNamespace(in.Namespace()))
	})
	return in, nil
}

// enter makes the instance's environment this process's.
func (in *Instance) enter() error {
	for _, v := range in.Env {
		name, value, _ := strings.Cut(v, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the instance with all containers in it. It takes at most three
// minutes and may be called again.
func (in *Instance) Close() error {
	if c, err := in.client(); err == nil {
		c.Close()
	}
	return in.end()
}

// Namespace is the containerd namespace that tests use; its images are there.
func (in *Instance) Namespace() string {
	return cmp.Or(lookup(in.Env, "CONTAINERD_NAMESPACE"), namespaces.Default)
}

// Client is a client of the instance's containerd, shared by all who ask; it
// reconnects when containerd was started again.
func (in *Instance) Client(t testing.TB) *containerd.Client {
	t.Helper()
	c, err := in.client()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Connect is Client for who has no test at hand.
func (in *Instance) Connect() (*containerd.Client, error) { return in.client() }

// Ctr runs the stock client and returns its standard output.
func (in *Instance) Ctr(ctx context.Context, args ...string) (string, error) {
	return in.Command(ctx, "ctr", args...)
}

// Cohort runs the cohort command and returns its standard output. The error of
// a command that failed is a *harness.CommandError with its exit code.
func (in *Instance) Cohort(ctx context.Context, args ...string) (string, error) {
	return in.Command(ctx, "cohort", args...)
}

// Command runs a program of the instance's PATH in its environment.
func (in *Instance) Command(ctx context.Context, program string, args ...string) (string, error) {
	path, err := in.LookPath(program)
	if err != nil {
		return "", err
	}
	return command(ctx, in.Env, path, args...)
}

// LookPath finds a program on the instance's PATH, which may differ from this
// process's.
func (in *Instance) LookPath(program string) (string, error) {
	for _, dir := range filepath.SplitList(lookup(in.Env, "PATH")) {
		if path := filepath.Join(dir, program); executable(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s on the PATH of the instance in %s", program, in.Dir)
}

// RemoveTemp removes the temporary files of the instance's containerd, which must
// be at rest: what stock checkpoints and restores leave.
func (in *Instance) RemoveTemp() error {
	left, err := filepath.Glob(filepath.Join(in.Dir, "tmp", "ctrd-checkpoint*"))
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// Name is a name of this instance alone, that starts with what it is for.
func (in *Instance) Name(use string) string {
	return fmt.Sprintf("%s-%s%d", use, in.tag, in.names.Add(1))
}

// command runs one program to its end.
func command(ctx context.Context, env []string, path string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = env
	// A grandchild that keeps the pipes open must not keep this waiting.
	cmd.WaitDelay = 5 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return out.String(), &harness.CommandError{Args: append([]string{path}, args...), Stderr: errs.String(), Err: err}
	}
	return out.String(), nil
}

// script runs one of the set-up's scripts, in the environment in which the
// tests were started and the variables of env.
func script(ctx context.Context, env []string, name string, args ...string) (string, error) {
	root, err := projectDir()
	if err != nil {
		return "", err
	}
	return command(ctx, append(os.Environ(), env...), filepath.Join(root, "contrib", "setup", name), args...)
}

// removeStale ends instances whose test binary has gone without ending them:
// it was killed, or ran into its time limit.
func removeStale(ctx context.Context, root string) {
	dirs, _ := filepath.Glob(filepath.Join(root, ".run-*-*-???"))
	for _, dir := range dirs {
		parts := strings.Split(filepath.Base(dir), "-")
		pid := parts[len(parts)-2]
		if _, err := os.Stat(filepath.Join("/proc", pid)); err == nil {
			continue
		}
		if _, err := script(ctx, nil, "down.sh", "--run", dir); err != nil {
			fmt.Fprintln(os.Stderr, "removing an instance left by another test run:", err)
		}
	}
}

// projectDir is the folder of this module.
func projectDir() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "contrib", "setup", "up.sh")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("not in the project's folder: no contrib/setup/up.sh here or above")
}

func toolsDir(root string) string {
	return cmp.Or(os.Getenv("COHORT_TOOLS"), filepath.Join(root, ".tools"))
}

func executable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}

// exported is the environment after the `export NAME=value` lines.
func exported(lines string) ([]string, error) {
	// The shell itself knows best how it quotes.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := command(ctx, os.Environ(), "/bin/sh", "-c", lines+"\nexec env -0")
	if err != nil {
		return nil, fmt.Errorf("reading what the set-up printed: %w", err)
	}
	return slices.DeleteFunc(strings.Split(out, "\x00"), func(v string) bool { return v == "" }), nil
}

func lookup(env []string, name string) string {
	for _, v := range slices.Backward(env) {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

func randomTag() string { return strings.ToLower(rand.Text()[:6]) }
