// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

const (
	// LogFile is CRIU's log, in the work directory of the dump.
	LogFile = "dump.log"
	// logLevel keeps errors and warnings only: a debug log of a container with
	// many mappings is megabytes, written while it is frozen.
	logLevel = 2
	// ghostLimit is the largest unlinked file that is carried inside the
	// images, in bytes. CRIU's default of 1 MiB is too small for databases,
	// which unlink temporary files early.
	ghostLimit = 512 << 20
)

// Config describes one dump.
type Config struct {
	// Container is what runc knows about the container.
	Container *Container
	// ImagesDir receives the images; it exists, mode 0700.
	ImagesDir string
	// WorkDir receives CRIU's log and statistics; it exists.
	WorkDir string
	// FreezeCgroup is the container's own freezer directory. The caller freezes
	// it; CRIU finds it frozen, seizes the tasks and leaves it frozen.
	FreezeCgroup string
	// External are mount points whose content the caller carries itself.
	External []string
	// SkipClean leaves out pages of tracked private mappings that were not written
	// since they were last taken: somebody else has them (runtime/memory/precopy).
	SkipClean bool
	// SkipShared lists shared memory objects that are left out, DEV:INO,DEV:INO,
	// because somebody else has them whole (runtime/memory/shm).
	SkipShared string
	// PreDumped says that ImagesDir has the images of PreDumps as its parent.
	PreDumped bool
	// SkipTmpfs leaves the images of the tmpfs mounts that CRIU would archive empty
	// where CRIU obeys (contrib/criu-preload): the caller fills them. See runtime/tmpfs.
	SkipTmpfs bool
	// YieldCPU has CRIU leave one of its processors to others.
	YieldCPU bool
	// InMemory keeps the images in memory until [Dump.Save]. It is for dumps whose
	// pages are few: making a file costs several times less there.
	InMemory bool
}

// Dump is a dump under way. Its methods are called from one goroutine, except
// Kill.
type Dump struct {
	s    *swrk
	cfg  Config
	imgs *os.File // the images directory, or one in memory
	work *os.File // where CRIU logs: the work directory, or one in memory
	// memory is set where both are a file system that this process alone can reach.
	memory bool
	// gate is nil where CRIU has no such thing.
	gate *gate
	// managed is set if the container's cgroups are part of the dump.
	managed bool
}

// Start starts CRIU and returns when it waits to be let at the tasks: before it looks for
// them, or at "pre-dump". No task of the container has been touched then.
func Start(ctx context.Context, cfg Config) (_ *Dump, retErr error) {
	opts, err := cfg.Container.dumpOptions(cfg.FreezeCgroup, cfg.External)
	if err != nil {
		return nil, err
	}
	d := &Dump{cfg: cfg, managed: opts.GetManageCgroupsMode() != rpc.CriuCgMode_IGNORE}
	defer func() {
		if retErr != nil {
			d.closeFiles()
		}
	}()
	if err := d.openDirs(); err != nil {
		return nil, err
	}
	if err := cfg.Container.writeDescriptors(cfg.ImagesDir); err != nil {
		return nil, err
	}
	var env []string
	if cfg.SkipClean {
		env = append(env, "COHORT_CRIU_SKIP_CLEAN=told") // see contrib/criu-preload
	}
	if cfg.SkipShared != "" {
		env = append(env, "COHORT_CRIU_SKIP_SHMEM="+cfg.SkipShared)
	}
	if cfg.FreezeCgroup != "" {
		env = append(env, "COHORT_CRIU_SMAPS="+cfg.FreezeCgroup)
	}
	if cfg.SkipTmpfs {
		env = append(env, "COHORT_CRIU_NO_TAR=1")
	}
	gate, far, err := newGate()
	if err != nil {
		return nil, err
	}
	d.s, err = startSwrk(cfg.WorkDir, far, append(env, gateEnv)...)
	far.Close()
	if err != nil {
		gate.close()
		return nil, err
	}
	d.gate = gate
	pid := d.s.cmd.Process.Pid
	// CRIU opens both through /proc/PID/fd of its peer, which is this process
	// (criu/cr-service.c, resolve_images_dir_path).
	opts.ImagesDirFd = proto.Int32(int32(d.imgs.Fd()))
	opts.WorkDirFd = proto.Int32(int32(d.work.Fd()))
	if cfg.FreezeCgroup != "" {
		opts.FreezeCgroup = proto.String(cfg.FreezeCgroup)
	}
	cfg.addParent(opts)
	stop := context.AfterFunc(ctx, d.s.kill)
	defer stop()
	t := rpc.CriuReqType_DUMP
	if err := d.s.send(&rpc.CriuReq{Type: &t, Opts: opts}); err != nil {
		d.Kill()
		return nil, d.explain(fmt.Errorf("ask CRIU (pid %d) for a dump: %w", pid, err))
	}
	resp, err := d.s.recv()
	if err == nil {
		err = expect(resp, "pre-dump")
	}
	if err == nil {
		err = d.approach(ctx)
	}
	if err != nil {
		d.Kill()
		return nil, d.explain(err)
	}
	return d, nil
}

// approach lets CRIU go on to the gate, if it has one.
func (d *Dump) approach(ctx context.Context) error {
	if !d.gate.isThere() {
		d.gate.close()
		d.gate = nil
		return nil
	}
	if err := d.s.ack(true); err != nil {
		return fmt.Errorf("let CRIU go: %w", err)
	}
	err := d.gate.await(ctx, gateTasks)
	if err != nil {
		// It may have said why.
		if resp, recvErr := d.s.recv(); recvErr == nil && !resp.GetSuccess() {
			err = respError(resp)
		}
	}
	return err
}

func expect(resp *rpc.CriuResp, script string) error {
	if !resp.GetSuccess() {
		return respError(resp)
	}
	if got := resp.GetNotify().GetScript(); resp.GetType() != rpc.CriuReqType_NOTIFY || got != script {
		return fmt.Errorf("CRIU sent %s %q where %q was due", resp.GetType(), got, script)
	}
	return nil
}

func respError(resp *rpc.CriuResp) error {
	msg := resp.GetCrErrmsg()
	if msg == "" {
		msg = fmt.Sprintf("type %s errno %d", resp.GetType(), resp.GetCrErrno())
	}
	return errors.New("CRIU failed: " + msg)
}

// Pid of the CRIU process, for the undo record.
func (d *Dump) Pid() int { return d.s.cmd.Process.Pid }

// Hooks are what is done along with a dump.
type Hooks struct {
	// Before runs first, beside what CRIU can do without changing anything in a task.
	// Of the processes that it returns, by their pid here, clean pages are left out
	// (SkipClean). Its error fails the dump.
	Before func() (held []int, err error)
	// Beside is called when CRIU has been let at the tasks, and is not to wait.
	Beside func()
	// PostDump runs when all is in the images and all tasks are still stopped; its error
	// fails the dump, and CRIU then leaves the tasks as they were.
	PostDump func() error
}

// Finish lets CRIU dump the (frozen) container. When it returns without an error CRIU
// has let go of the tasks, the cgroup is frozen as before, and [Dump.Save] is due;
// after an error CRIU is gone, but for one of Before where it has not begun.
//
// When ctx ends, Finish waits for grace before it kills CRIU: a CRIU killed in
// mid-dump leaves its parasite code in the tasks.
func (d *Dump) Finish(ctx context.Context, grace time.Duration, hooks Hooks) error {
	let := func() error { return d.s.ack(true) }
	ready := func() error { return nil }
	if d.gate != nil {
		let = func() error { return d.gate.open(gateTasks) }
		ready = d.gate.openAfter(hooks.Before, hooks.Beside)
	} else if _, err := hooks.Before(); err != nil {
		return err
	} else {
		hooks.Beside()
	}
	done := false
	defer func() {
		// CRIU answers when it has detached from all tasks. What is left for it to do,
		// to end, takes a millisecond in which the container may run.
		if !done {
			_ = d.s.close(context.WithoutCancel(ctx))
			d.closeFiles()
			_ = ready() // its error is not why
		}
	}()
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(grace):
			d.s.kill()
		case <-d.s.done:
		}
	})
	defer stop()
	hurry(d.Pid())
	if d.cfg.YieldCPU {
		yieldCPU(d.Pid())
	}
	if err := let(); err != nil {
		return d.explain(fmt.Errorf("let CRIU go: %w", err))
	}
	var hookErr error
	for {
		resp, err := d.s.recv()
		if err != nil {
			return d.explain(errors.Join(hookErr, err))
		}
		if !resp.GetSuccess() {
			if hookErr != nil {
				return hookErr
			}
			return d.explain(respError(resp))
		}
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			done = hookErr == nil
			if done {
				calm(d.Pid()) // the container is to run, not the end of CRIU
			}
			return hookErr
		}
		if resp.GetNotify().GetScript() == "post-dump" {
			hookErr = errors.Join(ctx.Err(), ready(), hooks.PostDump())
		}
		if err := d.s.ack(hookErr == nil); err != nil {
			return d.explain(errors.Join(hookErr, err))
		}
	}
}

// Save completes a dump that Finish has finished: when it returns, CRIU is gone and the
// images and the log are in their directories. The container may run meanwhile.
func (d *Dump) Save(ctx context.Context) error {
	defer d.closeFiles()
	if err := d.s.close(ctx); err != nil {
		return fmt.Errorf("wait for CRIU to end: %w", err)
	}
	if d.memory {
		if err := d.moveImages(); err != nil {
			return fmt.Errorf("write the images of container %s: %w", d.cfg.Container.ID, err)
		}
	}
	return d.forgetCgroup()
}

// forgetCgroup removes the image of the cgroups where they were not managed. CRIU
// writes the path of the container's cgroup into it all the same (criu/cgroup.c,
// dump_sets), and a restore would put a copy of the container into the original's cgroup.
func (d *Dump) forgetCgroup() error {
	if d.managed {
		return nil
	}
	err := os.Remove(filepath.Join(d.cfg.ImagesDir, cgroupImage))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Cancel ends a dump that waits at "pre-dump"; no task notices.
func (d *Dump) Cancel(ctx context.Context) error {
	defer d.closeFiles()
	// Before it has seized anything CRIU can be killed without harm; asking it
	// to fail costs a log and the same exit.
	d.s.kill()
	return d.s.close(ctx)
}

// Kill ends CRIU at once, whatever it is doing.
func (d *Dump) Kill() {
	d.s.kill()
	<-d.s.done
	d.saveLog()
	d.closeFiles()
}

func (d *Dump) closeFiles() {
	for _, f := range []*os.File{d.imgs, d.work} {
		if f != nil {
			f.Close()
		}
	}
	d.imgs, d.work = nil, nil
	if d.gate != nil {
		d.gate.close()
	}
}

func (d *Dump) explain(err error) error {
	d.saveLog()
	return Explain(err, filepath.Join(d.cfg.WorkDir, LogFile))
}
