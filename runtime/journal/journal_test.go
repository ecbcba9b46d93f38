// SPDX-License-Identifier: Apache-2.0

package journal

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestRecordsComeBackAsWritten(t *testing.T) {
	dir := t.TempDir()
	m := &Member{ID: "a", Namespace: "default", Address: "unix:///x", Shim: Self(), Group: "g", Name: "db"}
	e := &Epoch{ID: "a", Namespace: "default", Epoch: "e1", Shim: Self(), State: []byte(`{"state":"frozen"}`), Freezer: "/f"}
	for _, rec := range []any{m, e} {
		if err := Write(dir, rec); err != nil {
			t.Fatal(err)
		}
	}
	gotM, err := ReadMember(dir, "default", "a")
	if err != nil || *gotM != *m {
		t.Fatalf("member: %+v, %v; want %+v", gotM, err, m)
	}
	gotE, err := ReadEpoch(dir, "default", "a")
	if err != nil || gotE.Freezer != "/f" || string(gotE.State) != string(e.State) {
		t.Fatalf("epoch: %+v, %v", gotE, err)
	}
	r := &Restore{ID: "0a", Namespace: "default", Command: Self(), Netns: []string{"/n"}, Table: "t"}
	if err := Write(dir, r); err != nil {
		t.Fatal(err)
	}
	if list, err := Restores(dir); err != nil || len(list) != 1 || list[0].Netns[0] != "/n" || !list[0].Command.Alive() {
		t.Fatalf("restores: %+v, %v", list, err)
	}
	if err := RemoveRestore(dir, "default", "0a"); err != nil {
		t.Fatal(err)
	}
	if list, _ := Restores(dir); len(list) > 0 {
		t.Fatalf("a removed record is still there: %v", list)
	}
	if err := RemoveEpoch(dir, "default", "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadEpoch(dir, "default", "a"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a removed record is still there: %v", err)
	}
	if list, _ := Members(dir); len(list) != 1 {
		t.Fatalf("removing the epoch touched the members: %v", list)
	}
}

func TestRecordsAreForRootOnly(t *testing.T) {
	dir := t.TempDir()
	if err := Write(dir, &Member{ID: "a", Namespace: "n"}); err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(dir, "members", "n", "a.json")
	for _, f := range []struct {
		path string
		mode os.FileMode
	}{{p, 0o600}, {filepath.Dir(p), 0o700}} {
		fi, err := os.Stat(f.path)
		if err != nil || fi.Mode().Perm() != f.mode {
			t.Errorf("%s: mode %v, %v; want %v", f.path, fi.Mode().Perm(), err, f.mode)
		}
	}
}

func TestUnreadableRecordDoesNotHideTheOthers(t *testing.T) {
	dir := t.TempDir()
	if err := Write(dir, &Epoch{ID: "a", Namespace: "n"}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "epochs", "n", "b.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	list, err := Epochs(dir)
	if err != nil || len(list) != 1 || list[0].ID != "a" {
		t.Fatalf("got %v, %v", list, err)
	}
}

func TestProcIsTheVeryProcess(t *testing.T) {
	if !Self().Alive() {
		t.Fatal("this process is not alive")
	}
	other := Self()
	other.Start++
	if other.Alive() {
		t.Fatal("a process with another start time passes for this one")
	}
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := ProcOf(cmd.Process.Pid)
	_ = cmd.Wait()
	if err == nil && p.Alive() {
		t.Fatal("an ended process is alive")
	}
}
