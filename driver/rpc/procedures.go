package rpc

// The procedures of ProgramRemote that the driver knows.
const (
	ProcConnectOpen                       Procedure = 1
	ProcConnectClose                      Procedure = 2
	ProcConnectGetCapabilities            Procedure = 7
	ProcDomainAttachDevice                Procedure = 8
	ProcDomainCreate                      Procedure = 9
	ProcDomainCreateXML                   Procedure = 10
	ProcDomainDefineXML                   Procedure = 11
	ProcDomainDestroy                     Procedure = 12
	ProcDomainDetachDevice                Procedure = 13
	ProcDomainGetXMLDesc                  Procedure = 14
	ProcDomainGetInfo                     Procedure = 16
	ProcDomainReboot                      Procedure = 27
	ProcDomainResume                      Procedure = 28
	ProcDomainSetMaxMemory                Procedure = 30
	ProcDomainSetMemory                   Procedure = 31
	ProcDomainSetVcpus                    Procedure = 32
	ProcDomainShutdown                    Procedure = 33
	ProcDomainSuspend                     Procedure = 34
	ProcDomainUndefine                    Procedure = 35
	ProcDomainCoreDump                    Procedure = 53
	ProcDomainSave                        Procedure = 55
	ProcConnectSupportsFeature            Procedure = 60
	ProcDomainMigratePerform              Procedure = 62
	ProcAuthList                          Procedure = 66
	ProcDomainMigratePrepare2             Procedure = 108
	ProcConnectGetURI                     Procedure = 110
	ProcConnectDomainXMLToNative          Procedure = 136
	ProcDomainIsActive                    Procedure = 150
	ProcDomainAttachDeviceFlags           Procedure = 160
	ProcDomainDetachDeviceFlags           Procedure = 161
	ProcDomainAbortJob                    Procedure = 164
	ProcDomainUpdateDeviceFlags           Procedure = 174
	ProcDomainManagedSave                 Procedure = 182
	ProcDomainSnapshotCreateXML           Procedure = 185
	ProcDomainRevertToSnapshot            Procedure = 192
	ProcDomainCreateWithFlags             Procedure = 196
	ProcDomainSetVcpusFlags               Procedure = 199
	ProcDomainSetMemoryFlags              Procedure = 204
	ProcDomainGetState                    Procedure = 212
	ProcDomainMigrateBegin3               Procedure = 213
	ProcDomainMigratePrepare3             Procedure = 214
	ProcDomainMigratePerform3             Procedure = 216
	ProcDomainUndefineFlags               Procedure = 231
	ProcDomainSaveFlags                   Procedure = 232
	ProcDomainRestoreFlags                Procedure = 233
	ProcDomainDestroyFlags                Procedure = 234
	ProcDomainSaveImageGetXMLDesc         Procedure = 235
	ProcDomainSaveImageDefineXML          Procedure = 236
	ProcDomainReset                       Procedure = 245
	ProcDomainBlockResize                 Procedure = 251
	ProcDomainSetInterfaceParameters      Procedure = 256
	ProcDomainShutdownFlags               Procedure = 258
	ProcDomainPMSuspendForDuration        Procedure = 261
	ProcDomainSetMetadata                 Procedure = 264
	ProcConnectListAllDomains             Procedure = 273
	ProcDomainMigrateBegin3Params         Procedure = 302
	ProcDomainMigratePrepare3Params       Procedure = 303
	ProcDomainMigratePrepareTunnel3Params Procedure = 304
	ProcDomainMigratePerform3Params       Procedure = 305
	ProcDomainMigrateFinish3Params        Procedure = 306
	ProcDomainMigrateConfirm3Params       Procedure = 307
	ProcDomainCoreDumpWithFormat          Procedure = 334
	ProcConnectGetDomainCapabilities      Procedure = 342
	ProcDomainOpenGraphicsFD              Procedure = 343
	ProcDomainDefineXMLFlags              Procedure = 350
	ProcDomainSetGuestVcpus               Procedure = 372
	ProcDomainSetVcpu                     Procedure = 384
	ProcDomainManagedSaveGetXMLDesc       Procedure = 388
	ProcDomainManagedSaveDefineXML        Procedure = 389
	ProcDomainDetachDeviceAlias           Procedure = 392
	ProcDomainCheckpointCreateXML         Procedure = 411
	ProcDomainBackupBegin                 Procedure = 421
	ProcDomainStartDirtyRateCalc          Procedure = 427
	ProcDomainSaveParams                  Procedure = 440
	ProcDomainRestoreParams               Procedure = 441
	ProcDomainAbortJobFlags               Procedure = 442
)

// The features of ProcConnectSupportsFeature that the driver answers itself.
const (
	FeatureFDPassing        = 8
	FeatureProgramKeepalive = 10
)

// ConnectRO is the flag of ProcConnectOpen for a read-only connection.
const ConnectRO = 1 << 0

// Flags of a migration.
const (
	MigrateLive             = 1 << 0
	MigratePeer2Peer        = 1 << 1
	MigratePersistDest      = 1 << 3
	MigrateUndefineSource   = 1 << 4
	MigrateChangeProtection = 1 << 8
	MigrateUnsafe           = 1 << 9
	MigrateAbortOnError     = 1 << 12
	MigrateTLS              = 1 << 16
	MigrateKemari           = 1 << 30 // ours: protect
)
