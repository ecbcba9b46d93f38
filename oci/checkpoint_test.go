// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files")

func TestDocumentKeepsItsForm(t *testing.T) {
	dir := checkpointDir(t, sampleCheckpoint("db"))
	got, err := os.ReadFile(filepath.Join(dir, CheckpointFile))
	must(t, err)
	golden := filepath.Join("testdata", "cohort.json")
	if *update {
		must(t, os.MkdirAll("testdata", 0o755))
		must(t, os.WriteFile(golden, got, 0o644))
	}
	want, err := os.ReadFile(golden)
	must(t, err)
	if string(got) != string(want) {
		t.Errorf("the document has changed; if that is meant, think of Version and run with -update\n%s", got)
	}
}

func TestDocumentIsReadAsWritten(t *testing.T) {
	want := sampleCheckpoint("db")
	want.CutAt = cutTime.In(time.FixedZone("far", 3600))
	got, _, err := ReadCheckpointDir(checkpointDir(t, want))
	must(t, err)
	want.Version, want.Chain, want.CutAt = versionFull, 1, cutTime
	if !reflect.DeepEqual(*got, want) {
		t.Errorf("got  %+v\nwant %+v", *got, want)
	}
}

func TestCheckpointctlReadsTheDirectory(t *testing.T) {
	dir := checkpointDir(t, sampleCheckpoint("db"))
	c, _, err := metadata.ReadContainerCheckpointConfigDump(dir)
	must(t, err)
	if c.Name != "db" || c.ID != "db-1" || !c.CheckpointedAt.Equal(cutTime) || c.OCIRuntime != "io.containerd.cohort.v2" {
		t.Errorf("config.dump: %+v", c)
	}
	s, _, err := metadata.ReadContainerCheckpointSpecDump(dir)
	must(t, err)
	if s.Process.Args[0] != "/bin/app" {
		t.Errorf("spec.dump: %+v", s)
	}
}

func TestProcessNamesCannotCommandATerminal(t *testing.T) {
	ck := sampleCheckpoint("db")
	ck.Processes[0].Comm = "a\x1b[2J\xffb"
	got, _, err := ReadCheckpointDir(checkpointDir(t, ck))
	must(t, err)
	if got.Processes[0].Comm != "a?[2J?b" {
		t.Errorf("comm is %q", got.Processes[0].Comm)
	}
	if ck.Processes[0].Comm != "a\x1b[2J\xffb" {
		t.Error("the caller's document was changed")
	}
}

func TestHostileDocumentIsRefused(t *testing.T) {
	for name, change := range map[string]func(*Checkpoint){
		"version":     func(c *Checkpoint) { c.Version = 0 },
		"epoch":       func(c *Checkpoint) { c.Epoch = "../../etc/passwd" },
		"parent":      func(c *Checkpoint) { c.Parent, c.Chain = &ParentEpoch{Epoch: "x", Number: 1}, 2 },
		"own parent":  func(c *Checkpoint) { c.Parent, c.Chain = &ParentEpoch{Epoch: c.Epoch, Number: 1}, 2 },
		"younger":     func(c *Checkpoint) { c.Parent, c.Chain = &ParentEpoch{Epoch: epoch2, Number: c.EpochNumber}, 2 },
		"no parent":   func(c *Checkpoint) { c.Chain = 2 },
		"no chain":    func(c *Checkpoint) { c.Parent = &ParentEpoch{Epoch: epoch2, Number: 1} },
		"long chain":  func(c *Checkpoint) { c.Parent, c.Chain = &ParentEpoch{Epoch: epoch2, Number: 1}, 1<<30 },
		"below zero":  func(c *Checkpoint) { c.Chain = -1 },
		"group":       func(c *Checkpoint) { c.Group = "a/b" },
		"member":      func(c *Checkpoint) { c.Member = "../x" },
		"member name": func(c *Checkpoint) { c.Member = strings.Repeat("m", 77) },
		"container":   func(c *Checkpoint) { c.ContainerID = "" },
		"netns":       func(c *Checkpoint) { c.NetNS = "/proc/1/ns/net" },
		"cut time":    func(c *Checkpoint) { c.CutAt = time.Time{} },
		"digest":      func(c *Checkpoint) { c.Rootfs.ChainID = "sha256:../../x" },
		"criu":        func(c *Checkpoint) { c.CRIUVersion = "4\x1b[2J" },
		"destination": func(c *Checkpoint) { c.Mounts[0].Destination = "/proc/../etc" },
		"relative":    func(c *Checkpoint) { c.Mounts[0].Destination = "proc" },
		"file":        func(c *Checkpoint) { c.Mounts[2].File = "../spec.dump" },
		"file slash":  func(c *Checkpoint) { c.Mounts[2].File = "a/b" },
		"no file":     func(c *Checkpoint) { c.Mounts[2].File = "" },
		"file twice":  func(c *Checkpoint) { c.Mounts[3].Kind, c.Mounts[3].File = MountFile, "00-hosts" },
		"stray file":  func(c *Checkpoint) { c.Mounts[0].File = "00-hosts" },
		"kind":        func(c *Checkpoint) { c.Mounts[0].Kind = "host" },
		"namespace":   func(c *Checkpoint) { c.Namespaces[0].Kind = "" },
		"comm":        func(c *Checkpoint) { c.Processes[0].Comm = "\x1b]0;x\a" },
	} {
		t.Run(name, func(t *testing.T) {
			ck := sampleCheckpoint("db")
			ck.Version = Version
			change(&ck)
			dir := checkpointDir(t, sampleCheckpoint("db"))
			b, err := json.Marshal(ck)
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, CheckpointFile), b, 0o600))
			_, _, err = ReadCheckpointDir(dir)
			wantErr(t, err, errdefs.ErrInvalidArgument, CheckpointFile)
		})
	}
}

func TestNewerDocumentIsRefusedWithItsCure(t *testing.T) {
	ck := sampleCheckpoint("db")
	ck.Version = Version + 1
	wantErr(t, ck.Validate(), errdefs.ErrNotImplemented, "newer cohort")
}

func TestReadingADirectoryFollowsNoLinkAndNoSize(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte("{}"), 0o600))
	for name, create := range map[string]func(p string) error{
		"link out": func(p string) error { return os.Symlink(secret, p) },
		"link in":  func(p string) error { return os.Symlink("config.dump", p) },
		"fifo":     func(p string) error { return unix.Mkfifo(p, 0o600) },
		"dir":      func(p string) error { return os.Mkdir(p, 0o700) },
		"huge": func(p string) error {
			must(t, os.WriteFile(p, nil, 0o600))
			return os.Truncate(p, maxJSON+1)
		},
		"not json": func(p string) error { return os.WriteFile(p, []byte("{"), 0o600) },
	} {
		for _, file := range []string{CheckpointFile, SpecDumpFile} {
			t.Run(name+" "+file, func(t *testing.T) {
				dir := checkpointDir(t, sampleCheckpoint("db"))
				p := filepath.Join(dir, file)
				must(t, os.Remove(p))
				must(t, create(p))
				_, _, err := ReadCheckpointDir(dir)
				wantErr(t, err, errdefs.ErrInvalidArgument, file)
			})
		}
	}
	dir := checkpointDir(t, sampleCheckpoint("db"))
	must(t, os.Remove(filepath.Join(dir, CheckpointFile)))
	_, _, err := ReadCheckpointDir(dir)
	wantErr(t, err, errdefs.ErrNotFound, CheckpointFile)
}

func TestWritingIsWholeAndPrivate(t *testing.T) {
	dir := checkpointDir(t, sampleCheckpoint("db"))
	must(t, WriteCheckpointDir(dir, sampleCheckpoint("db2"), sampleSpec())) // again, over the first
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		fi, err := e.Info()
		must(t, err)
		if strings.HasPrefix(e.Name(), ".") || !e.IsDir() && fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", e.Name(), fi.Mode())
		}
	}
	wantErr(t, WriteCheckpointDir(t.TempDir(), Checkpoint{}, sampleSpec()), errdefs.ErrInvalidArgument)
	wantErr(t, WriteCheckpointDir(t.TempDir(), sampleCheckpoint("db"), nil), errdefs.ErrInvalidArgument)
}

func TestCapturedFileNamesAreSafe(t *testing.T) {
	for _, dest := range []string{"/etc/hosts", "/", "/a/..", "/é\n/x y", "/" + strings.Repeat("n", 300), "/.."} {
		n := FileName(7, dest)
		if err := checkName("files/"+n, false); err != nil {
			t.Errorf("%q gives %q: %v", dest, n, err)
		}
	}
	if FileName(0, "/etc/hosts") != "00-hosts" {
		t.Error(FileName(0, "/etc/hosts"))
	}
}
